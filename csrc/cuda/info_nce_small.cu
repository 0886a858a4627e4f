// InfoNCE of a small problem in one launch each way: there launches cost more than work.
#include "info_nce.cuh"

namespace fastxm {
namespace {

constexpr int kMost = 512;  // rows of x, and of y
template <class A>
constexpr int kOwn = 32 / sizeof(A);  // rows that a block owns
template <class A>
constexpr int kDepth = 64 / sizeof(A);  // features that are multiplied at once

// The rows that blocks own, against all others: x against y, or y against x.
template <class X>
struct Side {
  using A = Acc<X>;
  const X *own, *others;
  const A *own_factor, *other_factor;
  const int64_t *own_labels, *other_labels;  // 0 for none
  int own_count, other_count, depth;
  int target;  // row i has its positive in target + i
};

template <class A>
struct Tile {
  alignas(16) A own[kDepth<A>][kOwn<A>];
  A others[kDepth<A>][kThreads + 2];
};

template <class X>
__device__ __forceinline__ Acc<X> element(const X* rows, int count, int depth, int64_t row, int d) {
  return row < count && d < depth ? Acc<X>(to_float(rows[row * depth + d])) : Acc<X>(0);
}

// <own[first + r], others[other + thread]>; 0 outside
template <class X, class A = Acc<X>>
__device__ __forceinline__ void multiply(const Side<X>& s, int first, int other, Tile<A>& tile,
                                         A (&products)[kOwn<A>]) {
  constexpr int kD = kDepth<A>, kRows = kThreads / kD;
  const int thread = threadIdx.x, d = thread % kD, row = thread / kD;
  A ahead[kD], own = 0;
  const auto fetch = [&](int begin) {
    if (row < kOwn<A>) own = element(s.own, s.own_count, s.depth, first + row, begin + d);
#pragma unroll
    for (int k = 0; k < kD; ++k)
      ahead[k] = element(s.others, s.other_count, s.depth, other + row + k * kRows, begin + d);
  };
#pragma unroll
  for (int r = 0; r < kOwn<A>; ++r) products[r] = 0;
  fetch(0);
  for (int begin = 0; begin < s.depth; begin += kD) {
    __syncthreads();
    if (row < kOwn<A>) tile.own[d][row] = own;
#pragma unroll
    for (int k = 0; k < kD; ++k) tile.others[d][row + k * kRows] = ahead[k];
    __syncthreads();
    fetch(begin + kD);  // of the next round, while this one is multiplied
#pragma unroll
    for (int k = 0; k < kD; ++k) {
      const A y = tile.others[k][thread];
#pragma unroll
      for (int r = 0; r < kOwn<A>; ++r) products[r] += tile.own[k][r] * y;
    }
  }
}

template <class X>
__device__ __forceinline__ bool left_out(const Side<X>& s, int i, int j) {
  return s.own_labels && s.own_labels[i] == s.other_labels[j] && s.target + i != j;
}

template <class A>
struct Losses {
  A* loss;                      // [N], or its cotangent
  A *row_stats, *column_stats;  // [3, N] and [3, M], or the latter 0 if rows alone count
  const A* counts;              // candidates of each row, or 0 if all others are
  A smoothing;
};

// a block owns some rows of x, and the same rows of y if symmetric
template <class X>
__global__ void __launch_bounds__(kThreads, 2)
    small_fwd_kernel(const Side<X> rows, const Side<X> columns, const Losses<Acc<X>> out) {
  using A = Acc<X>;
  constexpr int kLanes = kThreads / kOwn<A>;
  __shared__ Tile<A> tile;
  __shared__ A logits[kOwn<A>][kMost];
  __shared__ Sums<A> parts[kOwn<A>][kLanes];
  const int first = blockIdx.x * kOwn<A>, row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int i = first + row, directions = out.column_stats ? 2 : 1;
  A loss = 0;
  for (int direction = 0; direction < directions; ++direction) {
    const Side<X> s = direction ? columns : rows;
    for (int other = 0; other < s.other_count; other += kThreads) {
      A products[kOwn<A>];
      multiply(s, first, other, tile, products);
      const int j = other + threadIdx.x;
#pragma unroll
      for (int r = 0; r < kOwn<A>; ++r)
        if (j < s.other_count && first + r < s.own_count)
          logits[r][j] = left_out(s, first + r, j)
                             ? -A(INFINITY)
                             : products[r] * (s.own_factor[first + r] * s.other_factor[j]);
    }
    __syncthreads();
    const bool mine = i < s.own_count;
    const int count = mine && lane < s.other_count ? (s.other_count - lane - 1) / kLanes + 1 : 0;
    parts[row][lane] = sums_of<A>(count, [&](int k) { return logits[row][lane + k * kLanes]; });
    for (int half = kLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) parts[row][lane] = join(parts[row][lane], parts[row][lane + half]);
    }
    if (lane > 0 || !mine) continue;
    const Sums<A> sums = parts[row][0];
    const A positive = logits[row][s.target + i], lse = sums.reference + log(sums.exps);
    const A candidates = out.counts ? out.counts[i] : A(s.other_count);
    loss += lse - positive + out.smoothing * (positive - sums.plain / candidates);
    A* stats = (direction ? out.column_stats : out.row_stats) + i;
    stats[0] = lse;
    stats[s.own_count] = lse - sums.dots / sums.exps;
    stats[2 * s.own_count] = positive >= sums.top ? A(1) : A(0);
  }
  if (lane == 0 && i < rows.own_count) out.loss[i] = loss / directions;
}

// of row i of x (side 0) or y (side 1); one that does not count has an infinite log-sum-exp
template <class A>
__device__ __forceinline__ Term<A> term(const Losses<A>& given, int side, int i, int others) {
  const A* lse = side ? given.column_stats : given.row_stats;
  if (!lse) return {A(INFINITY), A(0), A(0)};
  const A weight = given.column_stats ? given.loss[i] / 2 : given.loss[i];
  const A candidates = given.counts ? given.counts[i] : A(others);
  return {lse[i], weight, given.smoothing * weight / candidates};
}

template <class X>
struct Gradients {
  X *dx, *dy;            // [N, D] and [M, D]
  const Acc<X>* rnorms;  // [N + M], or 0 where lengths count
  Acc<X>* along;         // [N]
};

// a block owns some rows of x, or some rows of y, and their gradients
template <class X>
__global__ void __launch_bounds__(kThreads, 2)
    small_bwd_kernel(const Side<X> rows, const Side<X> columns, const Losses<Acc<X>> given,
                     const Gradients<X> out, int row_blocks) {
  using A = Acc<X>;
  constexpr int kLanes = kThreads / kOwn<A>;
  __shared__ Tile<A> tile;
  alignas(16) __shared__ A ds[kMost][kOwn<A>];
  const int side = int(blockIdx.x) < row_blocks ? 0 : 1;
  const Side<X> s = side ? columns : rows;
  const int first = (blockIdx.x - side * row_blocks) * kOwn<A>;
  A along[kOwn<A>] = {};  // <x[i], dx[i]>
  for (int other = 0; other < s.other_count; other += kThreads) {
    A products[kOwn<A>];
    multiply(s, first, other, tile, products);
    const int j = other + threadIdx.x;
    if (j >= s.other_count) continue;
    const Term<A> theirs = term(given, 1 - side, j, s.own_count);
#pragma unroll
    for (int r = 0; r < kOwn<A>; ++r) {
      const int i = first + r;
      ds[j][r] = 0;
      if (i >= s.own_count || left_out(s, i, j)) continue;
      const bool positive = s.target + i == j;
      const A both = s.own_factor[i] * s.other_factor[j], logit = products[r] * both;
      const A d = gradient(logit, term(given, side, i, s.other_count), positive, given.smoothing) +
                  gradient(logit, theirs, positive, given.smoothing);
      ds[j][r] = d * both;
      along[r] += d * logit;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kOwn<A>; ++r) tile.others[r][threadIdx.x] = along[r];
  __syncthreads();
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    for (int k = lane; k < half; k += kLanes) tile.others[row][k] += tile.others[row][k + half];
    __syncthreads();
  }
  if (side == 0 && lane == 0 && first + row < s.own_count)
    out.along[first + row] = tile.others[row][0];
#pragma unroll
  for (int r = 0; r < kOwn<A>; ++r)
    along[r] = out.rnorms && first + r < s.own_count
                   ? tile.others[r][0] * squared(out.rnorms[side * rows.own_count + first + r])
                   : A(0);
  for (int d = threadIdx.x; d < s.depth; d += kThreads) {
    A sum[kOwn<A>] = {};
#pragma unroll 16
    for (int j = 0; j < s.other_count; ++j) {
      const A y = to_float(s.others[int64_t(j) * s.depth + d]);
#pragma unroll
      for (int r = 0; r < kOwn<A>; ++r) sum[r] += ds[j][r] * y;
    }
#pragma unroll
    for (int r = 0; r < kOwn<A>; ++r)
      if (first + r < s.own_count) {
        const int64_t at = int64_t(first + r) * s.depth + d;
        if (out.rnorms) sum[r] -= along[r] * to_float(s.own[at]);
        from_float(sum[r], (side ? out.dy : out.dx)[at]);
      }
  }
}

template <class X>
void run(const InfoNceSmall& p, double smoothing, cudaStream_t stream) {
  using A = Acc<X>;
  const auto *x = pointer<const X>(p.x), *y = pointer<const X>(p.y);
  const auto *a = pointer<const A>(p.row_factor), *b = pointer<const A>(p.column_factor);
  const auto *own = pointer<const int64_t>(p.row_labels),
             *others = pointer<const int64_t>(p.column_labels);
  const int N = int(p.rows), M = int(p.columns), D = int(p.depth), target = int(p.target);
  const Side<X> rows = {x, y, a, b, own, others, N, M, D, target};
  const Side<X> columns = {y, x, b, a, others, own, M, N, D, -target};
  const Losses<A> losses = {pointer<A>(p.loss), pointer<A>(p.row_stats), pointer<A>(p.column_stats),
                            pointer<const A>(p.counts), static_cast<A>(smoothing)};
  const int row_blocks = int(ceil_div(N, kOwn<A>)), column_blocks = int(ceil_div(M, kOwn<A>));
  if (!p.dy)
    return launch("info_nce_small_fwd", small_fwd_kernel<X>, row_blocks, kThreads, stream, rows,
                  columns, losses);
  const Gradients<X> out = {pointer<X>(p.dx), pointer<X>(p.dy), pointer<const A>(p.rnorms),
                            pointer<A>(p.along)};
  launch("info_nce_small_bwd", small_bwd_kernel<X>, row_blocks + column_blocks, kThreads, stream,
         rows, columns, losses, out, row_blocks);
}

}  // namespace

void info_nce_small_cuda(const InfoNceSmallSizes& sizes, const InfoNceSmallAddresses& addresses,
                         double smoothing, std::uintptr_t stream_) {
  const InfoNceSmall p = info_nce_small(sizes, addresses);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_);
  if (p.columns > kMost || p.rows > p.columns || p.depth < 1)
    throw std::invalid_argument("info_nce: no small problem");
  with_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p, smoothing, stream); });
}

}  // namespace fastxm
