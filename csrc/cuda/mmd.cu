// MMD by CUDA: what is done to a tile of products. Formula: fastxm/ops/mmd_tiles.py.
#include "mmd.cuh"
#include "numbers.h"

namespace fastxm {
namespace {

// Sums of a strip of columns and a chunk of rows, and their weights, which may take the place of
// the products. A warp takes a row, a thread V neighbours of every 32 V columns; what the rows of a
// warp give to the columns is added up in shared memory, where each number belongs to one thread.
template <class T, class Out, int V>
__global__ void __launch_bounds__(kThreads, 2)
    tile_kernel(const Tile<T> t, const Parts parts, Out* weights) {
  constexpr int kStrip = strip_of<T>();
  __shared__ Part<T> part[kParts];
  alignas(16) __shared__ T sums[2][kWarps][kStrip];  // of k, and of weights
  read_parts(parts, t.parameters, part);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip = blockIdx.x % t.strips, chunk = blockIdx.x / t.strips;
  const int64_t first = strip * kStrip, begin = chunk * kChunk;
  const int64_t end = begin + kChunk < t.N ? begin + kChunk : t.N;
  T *potentials = sums[0][warp], *slopes = sums[1][warp];
  for (int at = lane * V; at < kStrip; at += 32 * V) {
    store(potentials + at, Pack<T, V>{});
    store(slopes + at, Pack<T, V>{});
  }
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    const T norm = t.radial ? t.x_norms[i] : T(0), left = t.x_weights[i], scale = t.x_scales[i];
    T potential = 0, slope = 0;
    for (int at = lane * V; at < kStrip && first + at < t.M; at += 32 * V) {
      T s[V], right[V], k[V], w[V];
      read_pairs<T, V>(t, i, first + at, norm, s, right);
      evaluate<T, V>(part, parts.count, s, k, w);
      Pack<T, V> of_columns = load<V>(potentials + at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        // a pair of a row with itself has no slope: its rows do not differ
        const bool own = t.diagonal != MmdDiagonal::plain && i == first + at + v;
        const bool dropped = own && t.diagonal == MmdDiagonal::dropped;
        if (dropped) k[v] = 0;
        if (dropped || (own && t.radial)) w[v] = 0;
        potential += k[v] * right[v];
        of_columns.at[v] += k[v] * left;
      }
      store(potentials + at, of_columns);
      if (!weights) continue;
      Pack<Out, V> out;
      of_columns = load<V>(slopes + at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        from_float(w[v] * scale * right[v], out.at[v]);
        const T rounded = to_float(out.at[v]);
        slope += rounded;
        of_columns.at[v] += rounded;
      }
      store(slopes + at, of_columns);
      store(weights + i * t.M + first + at, out);
    }
    potential = warp_sum(potential);
    slope = warp_sum(slope);
    if (lane == 0) {
      t.x_potentials[strip * t.N + i] = potential;
      if (weights) t.x_slopes[strip * t.N + i] = slope;
    }
  }
  __syncthreads();
  if (!t.y_potentials) return;
  for (int at = threadIdx.x; at < kStrip && first + at < t.M; at += kThreads) {
    T potential = 0, slope = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      potential += sums[0][k][at];
      slope += sums[1][k][at];
    }
    t.y_potentials[chunk * t.M + first + at] = potential;
    if (weights) t.y_slopes[chunk * t.M + first + at] = slope;
  }
}

// Derivatives by the shape and the weight of one part, of a strip of columns and a chunk of rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    derivatives_kernel(const Tile<T> t, const Parts parts, int64_t blocks, double* derivatives) {
  constexpr int kStrip = strip_of<T>();
  __shared__ double scratch[kWarps];
  const int64_t block = blockIdx.x % blocks, q = blockIdx.x / blocks;
  const int64_t first = block % t.strips * kStrip, begin = block / t.strips * kChunk;
  const int64_t end = begin + kChunk < t.N ? begin + kChunk : t.N;
  const T shape = t.parameters[q], weight = t.parameters[parts.count + q];
  const int degree = parts.degree[q];
  double by_shape = 0, by_weight = 0;
  with_kind(parts.kind[q], [&](auto kind) {
    constexpr MmdKind kKind = decltype(kind)::value;
    for (int64_t i = begin + threadIdx.x / 32; i < end; i += kWarps) {
      const T norm = t.radial ? t.x_norms[i] : T(0);
      T of_shape = 0, of_weight = 0;
      for (int at = threadIdx.x % 32; at < kStrip && first + at < t.M; at += 32) {
        T s[1], right[1], held = 1;
        read_pairs<T, 1>(t, i, first + at, norm, s, right);
        if (kKind == MmdKind::polynomial) held = inner_power(s[0], shape, weight, degree);
        const MmdPair<T> pair =
            mmd_pair<kKind, false>(s[0], shape, weight, static_cast<T>(degree), held);
        of_shape += right[0] * pair.by_shape;
        of_weight += right[0] * pair.by_weight;
      }
      by_shape += double(t.x_scales[i]) * of_shape;
      by_weight += double(t.x_scales[i]) * of_weight;
    }
  });
  by_shape = block_sum<kThreads>(by_shape, scratch);
  by_weight = block_sum<kThreads>(by_weight, scratch);
  if (threadIdx.x > 0) return;
  derivatives[q * blocks + block] = by_shape;
  derivatives[(parts.count + q) * blocks + block] = by_weight;
}

Parts parts_of(const MmdKernel& kernel) {
  const auto* kinds = pointer<const int64_t>(kernel.kinds);
  Parts parts{};
  for (int64_t term = 0; term < kernel.terms; ++term, kinds += 3)
    for (int64_t q = 0; q < kinds[2]; ++q) {
      if (parts.count == kParts || kinds[1] > 255)
        throw std::invalid_argument("mmd: more than 64 parts, or a degree above 255");
      parts.kind[parts.count] = static_cast<unsigned char>(kinds[0]);
      parts.degree[parts.count++] = static_cast<unsigned char>(kinds[1]);
    }
  return parts;
}

template <class T>
Tile<T> tile_of(const MmdKernel& kernel, const MmdTile& t, const Parts& parts) {
  return {t.N,
          t.M,
          ceil_div(t.M, strip_of<T>()),
          parts.kind[0] != static_cast<int>(MmdKind::polynomial),
          static_cast<MmdDiagonal>(t.diagonal),
          pointer<const T>(t.products),
          pointer<const T>(t.x_norms),
          pointer<const T>(t.y_norms),
          pointer<const T>(t.x_weights),
          pointer<const T>(t.y_weights),
          pointer<const T>(t.x_scales),
          pointer<const T>(kernel.parameters),
          pointer<T>(t.x_potentials),
          pointer<T>(t.x_slopes),
          pointer<T>(t.y_potentials),
          pointer<T>(t.y_slopes)};
}

template <class T, class Out>
void tile(const MmdKernel& kernel, const MmdTile& t, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const Parts parts = parts_of(kernel);
  const Tile<T> here = tile_of<T>(kernel, t, parts);
  const bool aligned = (t.products | t.weights | t.y_norms | t.y_weights) % 16 == 0;
  launch("mmd_tile", aligned && t.M % V == 0 ? tile_kernel<T, Out, V> : tile_kernel<T, Out, 1>,
         here.strips * ceil_div(t.N, kChunk), kThreads, stream, here, parts,
         pointer<Out>(t.weights));
}

template <class T>
void derivatives(const MmdKernel& kernel, const MmdTile& t, cudaStream_t stream) {
  const Parts parts = parts_of(kernel);
  const Tile<T> here = tile_of<T>(kernel, t, parts);
  const int64_t blocks = here.strips * ceil_div(t.N, kChunk);
  launch("mmd_derivatives", derivatives_kernel<T>, blocks * parts.count, kThreads, stream, here,
         parts, blocks, pointer<double>(t.derivatives));
}

}  // namespace

std::array<int64_t, 2> mmd_parts_cuda(bool wide, int64_t N, int64_t M) {
  return {ceil_div(M, wide ? strip_of<double>() : strip_of<float>()), ceil_div(N, kChunk)};
}

void mmd_tile_cuda(const MmdKernelNumbers& kernel_numbers, const MmdTileNumbers& numbers,
                   std::uintptr_t stream) {
  const auto kernel = struct_of<MmdKernel>(kernel_numbers);
  const auto t = struct_of<MmdTile>(numbers);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (kernel.wide)
    tile<double, double>(kernel, t, queue);
  else if (t.bf16)
    tile<float, __nv_bfloat16>(kernel, t, queue);
  else
    tile<float, float>(kernel, t, queue);
}

void mmd_derivatives_cuda(const MmdKernelNumbers& kernel_numbers, const MmdTileNumbers& numbers,
                          std::uintptr_t stream) {
  const auto kernel = struct_of<MmdKernel>(kernel_numbers);
  const auto t = struct_of<MmdTile>(numbers);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  kernel.wide ? derivatives<double>(kernel, t, queue) : derivatives<float>(kernel, t, queue);
}

}  // namespace fastxm
