// Device code of modulation.cu. A thread takes V neighbours at a time: columns of NCHW, channels of
// NHWC.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace fastxm {
namespace {

using std::int64_t;

constexpr int kThreads = 256;

template <class X>
using Acc = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <class X, class G>
struct Args {
  using A = Acc<X>;
  const X *x, *dout;
  X* out;
  const G *gamma, *beta;
  const A *mean, *rstd, *p, *q;
  A *first, *second, floor;
  int64_t planes, C;
  int h, w, k, W, n, parts;
  Divisor by_W, by_k;
  int lanes;  // threads side by side: over a plane, a row of cells, or the channels
  int depth;  // threads behind each other: of one cell
  int cells;  // cells side by side in a block
};

// out, or dx, of one value; scale = (1 + gamma) rstd
template <bool kBackward, class A>
__device__ __forceinline__ A map(A x, A dout, A mean, A scale, A shift, A p, A q, A floor) {
  const A d = x - mean, z = d * scale + shift;
  if (!kBackward) return z < floor ? floor : z;
  return (z <= floor ? A(0) : dout) * scale - p - d * q;
}

// a block owns kThreads / lanes planes, or one of `tiles` tiles of a plane
template <class X, class G, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads) plane_map_kernel(const Args<X, G> a, int tiles) {
  using A = Acc<X>;
  const int64_t plane = int64_t(blockIdx.x / tiles) * (kThreads / a.lanes) + threadIdx.x / a.lanes;
  if (plane >= a.planes) return;
  const A mean = a.mean[plane], rstd = a.rstd[plane];
  const A p = kBackward ? a.p[plane] : A(0), q = kBackward ? a.q[plane] : A(0);
  const int first = (blockIdx.x % tiles * a.lanes + threadIdx.x % a.lanes) * V;
  for (int e = first; e < a.n; e += tiles * a.lanes * V) {
    const int row = a.by_W.div(e), column = e - row * a.W;
    int j = a.by_k.div(column), inside = column - j * a.k;
    const int64_t cell = (plane * a.h + a.by_k.div(row)) * a.w;
    const Pack<X, V> x = load<V>(a.x + plane * a.n + e);
    Pack<X, V> dout{}, out;
    if (kBackward) dout = load<V>(a.dout + plane * a.n + e);
    A scale, shift;
#pragma unroll
    for (int u = 0; u < V; ++u) {
      if (u == 0 || inside == 0) {
        scale = (1 + A(to_float(a.gamma[cell + j]))) * rstd;
        shift = to_float(a.beta[cell + j]);
      }
      from_float(map<kBackward>(A(to_float(x.at[u])), A(to_float(dout.at[u])), mean, scale, shift,
                                p, q, a.floor),
                 out.at[u]);
      if (++inside == a.k) inside = 0, ++j;
    }
    store(a.out + plane * a.n + e, out);
  }
}

// a block owns `lanes` vectors of channels of one tile of an image's pixels
template <class X, class G, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads) pixel_map_kernel(const Args<X, G> a, int tiles) {
  using A = Acc<X>;
  const int lane = threadIdx.x % a.lanes, rows = kThreads / a.lanes;
  const int64_t b = blockIdx.x / tiles, c = (int64_t(blockIdx.y) * a.lanes + lane) * V;
  if (c >= a.C || int(threadIdx.x) >= rows * a.lanes) return;
  const Pack<A, V> mean = load<V>(a.mean + b * a.C + c), rstd = load<V>(a.rstd + b * a.C + c);
  Pack<A, V> p{}, q{};
  if (kBackward) p = load<V>(a.p + b * a.C + c), q = load<V>(a.q + b * a.C + c);
  for (int e = blockIdx.x % tiles * rows + threadIdx.x / a.lanes; e < a.n; e += tiles * rows) {
    const int row = a.by_W.div(e), cell = a.by_k.div(row) * a.w + a.by_k.div(e - row * a.W);
    const int64_t at = (b * a.n + e) * a.C + c, at_cell = (b * a.h * a.w + cell) * a.C + c;
    const Pack<X, V> x = load<V>(a.x + at);
    Pack<X, V> dout{}, out;
    if (kBackward) dout = load<V>(a.dout + at);
    const Pack<G, V> gamma = load<V>(a.gamma + at_cell), beta = load<V>(a.beta + at_cell);
#pragma unroll
    for (int u = 0; u < V; ++u)
      from_float(map<kBackward>(A(to_float(x.at[u])), A(to_float(dout.at[u])), mean.at[u],
                                (1 + A(to_float(gamma.at[u]))) * rstd.at[u],
                                A(to_float(beta.at[u])), p.at[u], q.at[u], a.floor),
                 out.at[u]);
    store(a.out + at, out);
  }
}

// count, mean and sum of squares about it (Welford); merged by Chan's rule
template <class A>
struct Moments {
  A n, mean, m2;
  __device__ __forceinline__ void merge(A n_, A mean_, A m2_) {
    const A total = n + n_, share = total > 0 ? n_ / total : A(0), delta = mean_ - mean;
    mean += delta * share;
    m2 += m2_ + delta * delta * n * share;
    n = total;
  }
};

// of the vectors x[i stride] with i = first, first + step, .. < end; returns how many there are
template <class A, class X, int V>
__device__ __forceinline__ int welford(Pack<A, V>& mean, Pack<A, V>& m2, const X* x, int64_t first,
                                       int64_t end, int step, int64_t stride) {
  constexpr int kAhead = 4;  // loads at once
  int count = 0;
  for (int64_t i = first; i < end; i += kAhead * step) {
    Pack<X, V> some[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r)
      if (i + r * step < end) some[r] = load<V>(x + (i + r * step) * stride);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (i + r * step >= end) break;
      const A share = divide_fast(A(1), A(++count));
#pragma unroll
      for (int u = 0; u < V; ++u) {
        const A value = to_float(some[r].at[u]), d = value - mean.at[u];
        mean.at[u] += d * share;
        m2.at[u] += d * (value - mean.at[u]);
      }
    }
  }
  return count;
}

// kLanes threads (a warp or a block) own one piece of a plane
template <class X, int V, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) plane_stats_kernel(const Args<X, X> a) {
  using A = Acc<X>;
  __shared__ Moments<A> warps[kThreads / 32];
  const int lane = threadIdx.x % kLanes, length = a.n / a.parts;
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (unit >= a.planes * a.parts) return;  // a whole warp, or the whole block
  const X* x = a.x + (unit % a.planes * a.parts + unit / a.planes) * length;
  Pack<A, V> mean{}, m2{};
  const int count = welford<A, X, V>(mean, m2, x, lane * V, length, kLanes * V, 1);
  Moments<A> all{A(count), mean.at[0], m2.at[0]};
#pragma unroll
  for (int u = 1; u < V; ++u) all.merge(A(count), mean.at[u], m2.at[u]);
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const A n = __shfl_down_sync(~0u, all.n, offset),
            mean_ = __shfl_down_sync(~0u, all.mean, offset);
    all.merge(n, mean_, __shfl_down_sync(~0u, all.m2, offset));
  }
  if (kLanes > 32) {
    if (lane % 32 == 0) warps[lane / 32] = all;
    __syncthreads();
    if (lane == 0)
      for (int i = 1; i < kLanes / 32; ++i) all.merge(warps[i].n, warps[i].mean, warps[i].m2);
  }
  if (lane == 0) {
    a.first[unit] = all.mean;
    a.second[unit] = all.m2 / A(length);
  }
}

// a block owns `lanes` vectors of channels of one piece of an image
template <class X, int V>
__global__ void __launch_bounds__(kThreads, 3) pixel_stats_kernel(const Args<X, X> a) {
  using A = Acc<X>;
  __shared__ Moments<A> sums[kThreads * V];
  const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes, rows = kThreads / a.lanes;
  const int64_t B = a.planes / a.C, unit = blockIdx.x, length = a.n / a.parts;
  const int64_t c = (int64_t(blockIdx.y) * a.lanes + lane) * V;
  const X* x = a.x + (unit % B * a.parts + unit / B) * length * a.C + c;
  Pack<A, V> mean{}, m2{};
  const bool here = row < rows && c < a.C;
  const int count = here ? welford<A, X, V>(mean, m2, x, row, length, rows, a.C) : 0;
#pragma unroll
  for (int u = 0; u < V; ++u)
    sums[threadIdx.x * V + u] = Moments<A>{A(count), mean.at[u], m2.at[u]};
  __syncthreads();
  for (int i = threadIdx.x; i < a.lanes * V; i += kThreads) {
    const int64_t channel = int64_t(blockIdx.y) * a.lanes * V + i;
    if (channel >= a.C) break;
    Moments<A> all = sums[i];
    for (int r = 1; r < rows; ++r) {
      const Moments<A> other = sums[r * a.lanes * V + i];
      all.merge(other.n, other.mean, other.m2);
    }
    a.first[unit * a.C + channel] = all.mean;
    a.second[unit * a.C + channel] = all.m2 / A(length);
  }
}

}  // namespace
}  // namespace fastxm
