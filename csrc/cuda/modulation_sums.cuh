// Device code of modulation.cu: the two sums a cell of the backward.
#pragma once

#include "modulation.cuh"

namespace fastxm {
namespace {

// sums of g and g (x - mean) over the values that a thread meets
template <class X, class G, int V>
struct Sums {
  using A = Acc<X>;
  Pack<A, V> scale, shift, mean, sum{}, dot{};
  __device__ __forceinline__ void add(const X* x_, const X* dout_, A floor) {
    const Pack<X, V> x = load<V>(x_), dout = load<V>(dout_);
#pragma unroll
    for (int u = 0; u < V; ++u) {
      const A d = A(to_float(x.at[u])) - mean.at[u];
      const A g = d * scale.at[u] + shift.at[u] <= floor ? A(0) : A(to_float(dout.at[u]));
      sum.at[u] += g;
      dot.at[u] += g * d;
    }
  }
};

// the block's sums in shared memory, `depth` rows added up into the first of each group
template <class A, int V>
__device__ __forceinline__ void fold(A (*sums)[kThreads * V], const Pack<A, V>& sum,
                                     const Pack<A, V>& dot, int lanes, int depth, int groups) {
  store(&sums[0][threadIdx.x * V], sum);
  store(&sums[1][threadIdx.x * V], dot);
  __syncthreads();
  const int width = lanes * V;
  for (int i = threadIdx.x; i < groups * width; i += kThreads) {
    const int at = i / width * depth * width + i % width;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      A total = sums[s][at];
      for (int r = 1; r < depth; ++r) total += sums[s][at + r * width];
      sums[s][at] = total;
    }
  }
  __syncthreads();
}

// a group of depth x lanes threads owns `cells` cells side by side, or a piece of their rows
template <class X, class G, int V>
__global__ void __launch_bounds__(kThreads) plane_sums_kernel(const Args<X, G> a) {
  using A = Acc<X>;
  alignas(16) __shared__ A sums[2][kThreads * V];
  const int groups = kThreads / a.lanes / a.depth, rows = a.k / a.parts, width = a.lanes * V;
  const int group = threadIdx.x / (a.lanes * a.depth), lane = threadIdx.x % a.lanes;
  const unsigned bands = unsigned(a.planes) * a.h, first = blockIdx.x * groups;
  const unsigned unit = first + group, band = unit % bands;
  const int j0 = blockIdx.y * a.cells, cells = min(a.cells, a.w - j0);
  Sums<X, G, V> s;
  if (group < groups && unit < bands * a.parts && lane * V < cells * a.k) {
    const A mean = a.mean[band / a.h], rstd = a.rstd[band / a.h];
#pragma unroll
    for (int u = 0; u < V; ++u) {
      const int64_t cell = int64_t(band) * a.w + j0 + a.by_k.div(lane * V + u);
      s.scale.at[u] = (1 + A(to_float(a.gamma[cell]))) * rstd;
      s.shift.at[u] = to_float(a.beta[cell]);
      s.mean.at[u] = mean;
    }
    const int64_t top = int64_t(band) * a.k + unit / bands * rows;
    for (int row = threadIdx.x / a.lanes % a.depth; row < rows; row += a.depth) {
      const int64_t at = ((top + row) * a.w + j0) * a.k;
      for (int e = lane * V; e < cells * a.k; e += width)  // again only within one large cell
        s.add(a.x + at + e, a.dout + at + e, a.floor);
    }
  }
  fold<A, V>(sums, s.sum, s.dot, a.lanes, a.depth, groups);
  const int threads = a.k > 8 ? 32 : 1, columns = min(a.k, width);  // threads that add up a cell
  for (int i = threadIdx.x / threads; i < groups * cells; i += kThreads / threads) {
    const int g = i / cells, j = i % cells, at = g * a.depth * width + j * a.k;
    A sum = 0, dot = 0;
    for (int e = threadIdx.x % threads; e < columns; e += threads) {
      sum += sums[0][at + e];
      dot += sums[1][at + e];
    }
    if (threads == 32) sum = warp_sum(sum), dot = warp_sum(dot);
    if (threadIdx.x % threads || first + g >= bands * a.parts) continue;
    const int64_t out = int64_t(first + g) * a.w + j0 + j;
    a.first[out] = dot * a.rstd[(first + g) % bands / a.h];
    a.second[out] = sum;
  }
}

// a group of depth x lanes threads owns some channels of one cell, or a piece of its rows
template <class X, class G, int V>
__global__ void __launch_bounds__(kThreads) pixel_sums_kernel(const Args<X, G> a) {
  using A = Acc<X>;
  alignas(16) __shared__ A sums[2][kThreads * V];
  const int groups = kThreads / a.lanes / a.depth, rows = a.k / a.parts;
  const int group = threadIdx.x / (a.lanes * a.depth), lane = threadIdx.x % a.lanes;
  const int64_t c0 = int64_t(blockIdx.y) * a.lanes * V, c = c0 + lane * V;
  const unsigned image = a.h * a.w, all = unsigned(a.planes / a.C) * image;
  const unsigned first = blockIdx.x * groups, unit = first + group, cell = unit % all;
  Sums<X, G, V> s;
  if (group < groups && unit < all * a.parts && c < a.C) {
    const int64_t plane = cell / image * a.C + c, at_cell = cell * a.C + c;
    const Pack<A, V> rstd = load<V>(a.rstd + plane);
    const Pack<G, V> gamma = load<V>(a.gamma + at_cell), beta = load<V>(a.beta + at_cell);
    s.mean = load<V>(a.mean + plane);
#pragma unroll
    for (int u = 0; u < V; ++u) {
      s.scale.at[u] = (1 + A(to_float(gamma.at[u]))) * rstd.at[u];
      s.shift.at[u] = to_float(beta.at[u]);
    }
    const int64_t top = int64_t(cell / a.w) * a.k + unit / all * rows;
    const int64_t corner = top * a.W + cell % a.w * a.k;
    for (int e = threadIdx.x / a.lanes % a.depth; e < rows * a.k; e += a.depth) {
      const int row = a.by_k.div(e);
      const int64_t at = (corner + int64_t(row) * a.W + e - row * a.k) * a.C + c;
      s.add(a.x + at, a.dout + at, a.floor);
    }
  }
  fold<A, V>(sums, s.sum, s.dot, a.lanes, a.depth, groups);
  const int width = a.lanes * V;
  for (int i = threadIdx.x; i < groups * width; i += kThreads) {
    const unsigned owner = first + i / width;
    const int64_t channel = c0 + i % width;
    if (owner >= all * a.parts || channel >= a.C) continue;
    const int at = i / width * a.depth * width + i % width;
    const int64_t out = owner * a.C + channel;
    a.first[out] = sums[1][at] * a.rstd[owner % all / image * a.C + channel];
    a.second[out] = sums[0][at];
  }
}

}  // namespace
}  // namespace fastxm
