// InfoNCE by CUDA: what is done to a block of products. Formula: fastxm/ops/info_nce.py.
#include "info_nce.cuh"

namespace fastxm {
namespace {

constexpr int kChunk = 128;  // rows of which a block sums the columns
constexpr int kBand = 128;   // rows of which a block writes the gradient

template <class T>
struct Block {
  const T *products, *row_factor, *column_factor;
  const int64_t *row_labels, *column_labels;  // 0 for none
  int64_t rows, columns, target;
};

// kRows logits of column j from row i on; -inf what is left out, or lies outside
template <class T, int kRows>
__device__ __forceinline__ void read_column(const Block<T>& b, int64_t i, int64_t j,
                                            T (&s)[kRows]) {
  const int64_t rows = j < b.columns ? b.rows - i : 0;
  const T* products = b.products + i * b.columns + j;
#pragma unroll
  for (int k = 0; k < kRows; ++k) s[k] = k < rows ? products[k * b.columns] : T(0);
  const T factor = j < b.columns ? b.column_factor[j] : T(0);
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    s[k] = k < rows ? s[k] * (b.row_factor[i + k] * factor) : -T(INFINITY);
  if (!b.column_labels || j >= b.columns) return;
  const int64_t label = b.column_labels[j];
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    if (k < rows && b.row_labels[i + k] == label && b.target + i + k != j) s[k] = -T(INFINITY);
}

// Sums of a strip of kThreads columns and a chunk of rows: of the rows into row_parts [strips, 5,
// rows], of the columns into column_parts [chunks, 5, columns]. A thread takes a column of a tile,
// then part of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fwd_kernel(const Block<T> b, T* row_parts, T* column_parts, T* positives) {
  constexpr int kRows = 128 / sizeof(T), kLanes = kThreads / kRows, kStride = kThreads + kLanes;
  __shared__ T tile[kRows * kStride];
  __shared__ Sums<T> parts[kRows][kLanes];
  const int64_t strips = (b.columns + kThreads - 1) / kThreads;
  const int64_t strip = blockIdx.x % strips, chunk = blockIdx.x / strips;
  const int64_t j = strip * kThreads + threadIdx.x, begin = chunk * kChunk;
  const int64_t end = begin + kChunk < b.rows ? begin + kChunk : b.rows;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  Sums<T> column = no_sums<T>();
  for (int64_t i = begin; i < end; i += kRows) {
    T s[kRows];
    read_column(b, i, j, s);
    column = join(column, sums_of<T>(kRows, [&](int k) { return s[k]; }));
#pragma unroll
    for (int k = 0; k < kRows; ++k) tile[k * kStride + threadIdx.x] = s[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRows; ++k) s[k] = tile[row * kStride + lane + k * kLanes];
    parts[row][lane] = sums_of<T>(kRows, [&](int k) { return s[k]; });
    const int64_t at = b.target + i + row - strip * kThreads;  // of the row's positive
    if (lane == 0 && i + row < end && at >= 0 && at < kThreads && at + strip * kThreads < b.columns)
      positives[i + row] = tile[row * kStride + at];
    __syncthreads();
    if (threadIdx.x < kRows && i + threadIdx.x < end) {
      Sums<T> sums = parts[threadIdx.x][0];
#pragma unroll
      for (int k = 1; k < kLanes; ++k) sums = join(sums, parts[threadIdx.x][k]);
      write_sums(sums, row_parts + strip * kStatistics * b.rows + i + threadIdx.x, b.rows);
    }
  }
  if (j < b.columns)
    write_sums(column, column_parts + chunk * kStatistics * b.columns + j, b.columns);
}

template <class T>
struct Join {
  const T* parts;  // [count, 5, n]
  int64_t count, n;
  T* into;  // [5, stride]
  int64_t stride;
};

// takes the parts of 32 rows, or of 32 columns, into their sums
template <class T>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const Join<T> rows, const Join<T> columns, int64_t row_blocks) {
  constexpr int kDepth = kThreads / 32;
  __shared__ Sums<T> found[kDepth][32];
  const bool of_rows = blockIdx.x < row_blocks;
  const Join<T> a = of_rows ? rows : columns;
  const int lane = threadIdx.x % 32, depth = threadIdx.x / 32;
  const int64_t i = (of_rows ? blockIdx.x : blockIdx.x - row_blocks) * 32 + lane;
  Sums<T> sums = depth == 0 && i < a.n ? read_sums(a.into + i, a.stride) : no_sums<T>();
  if (i < a.n)
    for (int64_t k = depth; k < a.count; k += kDepth)
      sums = join(sums, read_sums(a.parts + k * kStatistics * a.n + i, a.n));
  found[depth][lane] = sums;
  __syncthreads();
  if (depth > 0 || i >= a.n) return;
#pragma unroll
  for (int k = 1; k < kDepth; ++k) sums = join(sums, found[k][lane]);
  write_sums(sums, a.into + i, a.stride);
}

template <class T>
struct Terms {
  const T *rows, *columns;  // [3, row_stride] and [3, columns], or 0 if only rows count
  int64_t row_stride;
  T smoothing;
};

// Gradients of a band of rows times both factors; they may take the place of the products. A warp
// takes 32 V columns of a row, a thread V neighbours.
template <class T, class Out, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    bwd_kernel(const Block<T> b, const Terms<T> terms, Out* out) {
  const int64_t strips = (b.columns + 32 * V - 1) / (32 * V);
  const int64_t j = (blockIdx.x % strips * 32 + threadIdx.x % 32) * V;
  const int64_t begin = blockIdx.x / strips * kBand;
  const int64_t end = begin + kBand < b.rows ? begin + kBand : b.rows;
  if (j >= b.columns) return;
  const Pack<T, V> factor = load<V>(b.column_factor + j);
  Pack<T, V> lse{}, weight{}, even{};
  if (kColumns) {
    lse = load<V>(terms.columns + j);
    weight = load<V>(terms.columns + b.columns + j);
    even = load<V>(terms.columns + 2 * b.columns + j);
  }
  constexpr int kStep = kThreads / 32;
  int64_t i = begin + threadIdx.x / 32;
  Pack<T, V> next{};
  if (i < end) next = load<V>(b.products + i * b.columns + j);
  for (; i < end; i += kStep) {
    const Pack<T, V> products = next;
    if (i + kStep < end) next = load<V>(b.products + (i + kStep) * b.columns + j);
    const T* at = terms.rows + i;
    const Term<T> row = {at[0], at[terms.row_stride], at[2 * terms.row_stride]};
    const T row_factor = b.row_factor[i];
    Pack<Out, V> result;
#pragma unroll
    for (int u = 0; u < V; ++u) {
      const T both = row_factor * factor.at[u], s = products.at[u] * both;
      const bool positive = b.target + i == j + u;
      T ds = gradient(s, row, positive, terms.smoothing);
      if (kColumns)
        ds += gradient(s, {lse.at[u], weight.at[u], even.at[u]}, positive, terms.smoothing);
      if (b.column_labels && b.column_labels[j + u] == b.row_labels[i] && !positive) ds = 0;
      from_float(ds * both, result.at[u]);
    }
    store(out + i * b.columns + j, result);
  }
}

template <class T>
Block<T> block_of(const InfoNceBlock& b) {
  return {pointer<const T>(b.products),
          pointer<const T>(b.row_factor),
          pointer<const T>(b.column_factor),
          pointer<const int64_t>(b.row_labels),
          pointer<const int64_t>(b.column_labels),
          b.rows,
          b.columns,
          b.target};
}

template <class T>
void fwd(const InfoNceBlock& b, T* row_stats, int64_t row_stride, T* column_stats, T* workspace,
         cudaStream_t stream) {
  const int64_t strips = ceil_div(b.columns, kThreads), chunks = ceil_div(b.rows, kChunk);
  T* column_parts = workspace + strips * kStatistics * b.rows;
  launch("info_nce_fwd", fwd_kernel<T>, strips * chunks, kThreads, stream, block_of<T>(b),
         workspace, column_parts, row_stats + kStatistics * row_stride);
  const Join<T> rows = {workspace, strips, b.rows, row_stats, row_stride};
  const Join<T> columns = {column_parts, chunks, b.columns, column_stats, b.columns};
  const int64_t row_blocks = ceil_div(b.rows, 32);
  launch("info_nce_fwd", join_kernel<T>, row_blocks + ceil_div(b.columns, 32), kThreads, stream,
         rows, columns, row_blocks);
}

template <class T, class Out, int V>
void bwd_vectors(const InfoNceBlock& b, const Terms<T>& terms, Out* out, cudaStream_t stream) {
  const int64_t blocks = ceil_div(b.columns, 32 * V) * ceil_div(b.rows, kBand);
  const auto kernel = terms.columns ? bwd_kernel<T, Out, V, true> : bwd_kernel<T, Out, V, false>;
  launch("info_nce_bwd", kernel, blocks, kThreads, stream, block_of<T>(b), terms, out);
}

template <class T, class Out>
void bwd(const InfoNceBlock& b, const Terms<T>& terms, std::uintptr_t out, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(Out);
  const auto columns = reinterpret_cast<std::uintptr_t>(terms.columns);
  const bool aligned = (b.products | b.column_factor | columns | out) % 16 == 0;
  if (aligned && b.columns % V == 0)
    bwd_vectors<T, Out, V>(b, terms, pointer<Out>(out), stream);
  else
    bwd_vectors<T, Out, 1>(b, terms, pointer<Out>(out), stream);
}

}  // namespace

std::int64_t info_nce_workspace_cuda(std::int64_t rows, std::int64_t columns) {
  return kStatistics * (ceil_div(columns, kThreads) * rows + ceil_div(rows, kChunk) * columns);
}

void info_nce_fwd_cuda(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                       std::uintptr_t row_stats, std::int64_t row_stride,
                       std::uintptr_t column_stats, std::uintptr_t workspace,
                       std::uintptr_t stream) {
  const InfoNceBlock b = info_nce_block(sizes, addresses);
  const auto run = [&](auto type) {
    using T = decltype(type);
    fwd(b, pointer<T>(row_stats), row_stride, pointer<T>(column_stats), pointer<T>(workspace),
        reinterpret_cast<cudaStream_t>(stream));
  };
  b.float64 ? run(double()) : run(float());
}

void info_nce_bwd_cuda(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                       std::uintptr_t row_terms, std::int64_t row_stride,
                       std::uintptr_t column_terms, double smoothing, bool out_bf16,
                       std::uintptr_t out, std::uintptr_t stream) {
  const InfoNceBlock b = info_nce_block(sizes, addresses);
  const auto run = [&](auto type, auto result) {
    using T = decltype(type);
    const Terms<T> terms = {pointer<const T>(row_terms), pointer<const T>(column_terms), row_stride,
                            static_cast<T>(smoothing)};
    bwd<T, decltype(result)>(b, terms, out, reinterpret_cast<cudaStream_t>(stream));
  };
  if (b.float64)
    run(double(), double());
  else if (out_bf16)
    run(float(), __nv_bfloat16());
  else
    run(float(), float());
}

}  // namespace fastxm
