// What InfoNCE makes of rows one by one: fastxm/ops/info_nce_rows.py. A warp takes a row.
#include "info_nce.cuh"

namespace fastxm {
namespace {

constexpr int kRows = kThreads / 32;  // of a block

// f of what a lane has of a row, V neighbours at a time
template <int V, class F>
__device__ __forceinline__ void each(int64_t depth, F f) {
  for (int64_t d = int64_t(threadIdx.x % 32) * V; d < depth; d += 32 * V) f(d);
}

template <class X, int V>
__global__ void __launch_bounds__(kThreads)
    rnorms_kernel(const X* x, const X* y, int64_t rows, int64_t columns, int64_t depth,
                  Acc<X>* rnorms) {
  using A = Acc<X>;
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  if (i >= rows + columns) return;
  const X* row = i < rows ? x + i * depth : y + (i - rows) * depth;
  A sum = 0;
  each<V>(depth, [&](int64_t d) {
    const Pack<X, V> pack = load<V>(row + d);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += A(to_float(pack.at[k])) * A(to_float(pack.at[k]));
  });
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) rnorms[i] = A(1) / sqrt(sum < A(1e-12) ? A(1e-12) : sum);
}

template <class X>
struct Finish {
  const X* x;            // [rows, depth]
  const Acc<X>* dx;      // [rows, depth], `stride` apart
  const Acc<X>* rnorms;  // [rows], or 0
  X* out;                // [rows, depth]
  Acc<X>* along;         // [rows]
  int64_t rows, depth, stride;
};

template <class X, int V>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish<X> f) {
  using A = Acc<X>;
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  if (i >= f.rows) return;
  const X* x = f.x + i * f.depth;
  const A* dx = f.dx + i * f.stride;
  A along = 0;
  each<V>(f.depth, [&](int64_t d) {
    const Pack<X, V> of_x = load<V>(x + d);
    const Pack<A, V> grad = load<V>(dx + d);
#pragma unroll
    for (int k = 0; k < V; ++k) along += A(to_float(of_x.at[k])) * grad.at[k];
  });
  along = warp_sum(along);
  if (threadIdx.x % 32 == 0) f.along[i] = along;
  const A share = f.rnorms ? along * squared(f.rnorms[i]) : A(0);
  each<V>(f.depth, [&](int64_t d) {
    const Pack<X, V> of_x = load<V>(x + d);
    const Pack<A, V> grad = load<V>(dx + d);
    Pack<X, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A rest = f.rnorms ? grad.at[k] - share * A(to_float(of_x.at[k])) : grad.at[k];
      from_float(rest, out.at[k]);
    }
    store(f.out + i * f.depth + d, out);
  });
}

}  // namespace

void info_nce_rnorms_cuda(const InfoNceRowsSizes& sizes, std::uintptr_t x, std::uintptr_t y,
                          std::uintptr_t rnorms, std::uintptr_t stream) {
  const int64_t rows = sizes[1], columns = sizes[2], depth = sizes[3];
  with_dtype(sizes[0], [&](auto element) {
    using X = decltype(element);
    constexpr int V = 16 / sizeof(X);
    const auto kernel =
        (x | y) % 16 == 0 && depth % V == 0 ? rnorms_kernel<X, V> : rnorms_kernel<X, 1>;
    launch("info_nce_rnorms", kernel, ceil_div(rows + columns, kRows), kThreads,
           reinterpret_cast<cudaStream_t>(stream), pointer<const X>(x), pointer<const X>(y), rows,
           columns, depth, pointer<Acc<X>>(rnorms));
  });
}

void info_nce_finish_cuda(const InfoNceRowsSizes& sizes,
                          const std::array<std::uintptr_t, 5>& addresses, std::uintptr_t stream) {
  const auto [x, dx, rnorms, out, along] = addresses;
  const int64_t rows = sizes[1], depth = sizes[2], stride = sizes[3];
  const bool aligned = (x | dx | out) % 16 == 0;
  with_dtype(sizes[0],
             [&, x = x, dx = dx, rnorms = rnorms, out = out, along = along](auto element) {
               using X = decltype(element);
               using A = Acc<X>;
               constexpr int V = 16 / sizeof(X);
               const Finish<X> f = {pointer<const X>(x),
                                    pointer<const A>(dx),
                                    pointer<const A>(rnorms),
                                    pointer<X>(out),
                                    pointer<A>(along),
                                    rows,
                                    depth,
                                    stride};
               const auto kernel =
                   aligned && (depth | stride) % V == 0 ? finish_kernel<X, V> : finish_kernel<X, 1>;
               launch("info_nce_finish", kernel, ceil_div(rows, kRows), kThreads,
                      reinterpret_cast<cudaStream_t>(stream), f);
             });
}

}  // namespace fastxm
