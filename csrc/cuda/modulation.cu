// Modulation by CUDA: how the passes are launched. Formula: fastxm/ops/modulation.py.
#include "modulation.h"

#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "modulation.cuh"
#include "modulation_sums.cuh"

namespace fastxm {
namespace {

using Pass = ModulationPass;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class... Params, class... Given>
void run_kernel(void (*kernel)(Params...), Grid grid, cudaStream_t stream, const Given&... given) {
  launch("modulation", kernel, grid, kThreads, stream, given...);
}

// cells side by side in a block of plane_sums_kernel; whole vectors where there are several blocks
int64_t row_of_cells(const Modulation& s, int64_t V) {
  const int64_t fit = std::max<int64_t>(1, kThreads * V / s.k);
  return fit >= s.w ? s.w : (fit >= V ? fit - fit % V : fit);
}

// whether V neighbours are always together, and aligned
bool fits(Pass pass, const Modulation& s, int64_t V) {
  const std::uintptr_t all = s.dout | s.x | s.gamma | s.beta | s.mean | s.rstd | s.p | s.q | s.out;
  if (all % 16) return false;
  if (s.last) return s.C % V == 0;
  if (pass == Pass::stats) return s.h * s.w * s.k * s.k / s.parts % V == 0;
  const int64_t cells = row_of_cells(s, V);
  return s.w * s.k % V == 0 && (pass != Pass::sums || cells == s.w || cells * s.k % V == 0);
}

template <class X, class G>
Args<X, G> arguments(const Modulation& s) {
  using A = Acc<X>;
  const auto address = [](std::uintptr_t at) { return reinterpret_cast<void*>(at); };
  return {static_cast<const X*>(address(s.x)),
          static_cast<const X*>(address(s.dout)),
          static_cast<X*>(address(s.out)),
          static_cast<const G*>(address(s.gamma)),
          static_cast<const G*>(address(s.beta)),
          static_cast<const A*>(address(s.mean)),
          static_cast<const A*>(address(s.rstd)),
          static_cast<const A*>(address(s.p)),
          static_cast<const A*>(address(s.q)),
          static_cast<A*>(address(s.first)),
          static_cast<A*>(address(s.second)),
          s.relu ? A(0) : -A(INFINITY),
          s.B * s.C,
          s.C,
          int(s.h),
          int(s.w),
          int(s.k),
          int(s.w * s.k),
          int(s.h * s.w * s.k * s.k),
          int(s.parts),
          Divisor(s.w * s.k),
          Divisor(s.k),
          0,
          0,
          0};
}

template <class X, class G, int V>
void run_map(bool backward, const Modulation& s, Args<X, G> a, cudaStream_t stream) {
  if (s.last) {
    a.lanes = int(std::min<int64_t>(kThreads, s.C / V));
    const int tiles = int(ceil_div(a.n, kThreads / a.lanes * 8));
    const Grid grid(s.B * tiles, ceil_div(s.C / V, a.lanes));
    const auto kernel =
        backward ? pixel_map_kernel<X, G, V, true> : pixel_map_kernel<X, G, V, false>;
    run_kernel(kernel, grid, stream, a, tiles);
  } else {
    for (a.lanes = 32; a.lanes < kThreads && a.lanes * 4 * V < a.n;) a.lanes *= 2;
    const int tiles = a.lanes < kThreads ? 1 : int(ceil_div(a.n, kThreads * 4 * V));
    const Grid grid(ceil_div(a.planes, kThreads / a.lanes) * tiles);
    const auto kernel =
        backward ? plane_map_kernel<X, G, V, true> : plane_map_kernel<X, G, V, false>;
    run_kernel(kernel, grid, stream, a, tiles);
  }
}

template <class X, class G, int V>
void run_sums(const Modulation& s, Args<X, G> a, cudaStream_t stream) {
  const int64_t rows = s.k / s.parts;
  a.cells = s.last ? 1 : int(row_of_cells(s, V));
  a.lanes = int(std::min<int64_t>(kThreads, ceil_div(s.last ? s.C : a.cells * s.k, V)));
  // some four values a thread
  const int64_t deep = (s.last ? rows * s.k : rows) / 4;
  a.depth = int(std::clamp<int64_t>(deep, 1, kThreads / a.lanes));
  const int64_t units = s.parts * s.B * s.h * (s.last ? s.w : s.C),
                groups = kThreads / a.lanes / a.depth;
  if (s.last)
    run_kernel(pixel_sums_kernel<X, G, V>, {ceil_div(units, groups), ceil_div(s.C, a.lanes * V)},
               stream, a);
  else
    run_kernel(plane_sums_kernel<X, G, V>, {ceil_div(units, groups), ceil_div(s.w, a.cells)},
               stream, a);
}

template <class X, int V>
void run_stats(const Modulation& s, Args<X, X> a, cudaStream_t stream) {
  const int64_t pieces = s.parts * s.B;
  if (s.last) {
    a.lanes = int(std::min<int64_t>(kThreads, s.C / V));
    run_kernel(pixel_stats_kernel<X, V>, {pieces, ceil_div(s.C / V, a.lanes)}, stream, a);
  } else if (a.n / a.parts <= 32 * 4 * V) {
    run_kernel(plane_stats_kernel<X, V, 32>, ceil_div(pieces * s.C, kThreads / 32), stream, a);
  } else {
    run_kernel(plane_stats_kernel<X, V, kThreads>, pieces * s.C, stream, a);
  }
}

template <class X, class G, int V>
void run_vectors(Pass pass, const Modulation& s, cudaStream_t stream) {
  const Args<X, G> a = arguments<X, G>(s);
  if (pass == Pass::sums) return run_sums<X, G, V>(s, a, stream);
  if (pass != Pass::stats) return run_map<X, G, V>(pass == Pass::dx, s, a, stream);
  if constexpr (std::is_same_v<X, G>) run_stats<X, V>(s, a, stream);
}

template <class X, class G>
void run(Pass pass, const Modulation& s, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(X);
  if (fits(pass, s, V)) return run_vectors<X, G, V>(pass, s, stream);
  run_vectors<X, G, 1>(pass, s, stream);
}

}  // namespace

void modulation_cuda(int pass, const ModulationSizes& sizes, const ModulationAddresses& addresses,
                     std::uintptr_t stream_) {
  const Modulation s = modulation(sizes, addresses);
  const Pass p = static_cast<Pass>(pass);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_);
  const auto is = [&](int x, int gamma) { return s.x_dtype == x && s.gamma_dtype == gamma; };
  if (is(0, 0))
    run<float, float>(p, s, stream);
  else if (is(1, 0))
    run<__nv_bfloat16, float>(p, s, stream);
  else if (is(1, 1))
    run<__nv_bfloat16, __nv_bfloat16>(p, s, stream);
  else if (is(2, 0))
    run<__half, float>(p, s, stream);
  else if (is(2, 2))
    run<__half, __half>(p, s, stream);
  else if (is(3, 3))
    run<double, double>(p, s, stream);
  else
    throw std::invalid_argument("modulation has no CUDA kernel for these dtypes");
}

}  // namespace fastxm
