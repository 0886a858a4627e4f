// InfoNCE over a block of logits: tiles of it one after the other, on several threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/info_nce.h"
#include "cpu/info_nce_avx512.h"
#include "cpu/info_nce_products.h"
#include "cpu/info_nce_tile.h"

namespace fastxm {
namespace {

constexpr std::int64_t kSmall = 1 << 14;  // entries below which threads cost more than they give

template <class E>
constexpr std::int64_t kChunk = 16 * kTile<E>;  // most rows that one thread takes of a strip

// OpenMP outlines its regions before functions are cloned for each instruction set: so the cloned
// functions take one tile, and the loops over tiles stand outside
#define FASTXM_INSTANCES(T, E)                                                                  \
  FASTXM_MULTIARCH void fwd_tile(const Tile<T>& t, T* row, std::int64_t row_stride, T* columns, \
                                 Kept<E>* kept) {                                               \
    fwd_tile_of(t, row, row_stride, columns, kept);                                             \
  }
FASTXM_INSTANCES(float, float)
FASTXM_INSTANCES(float, bfloat16)
FASTXM_INSTANCES(double, float)
#undef FASTXM_INSTANCES
#define FASTXM_INSTANCES(T)                                                                    \
  FASTXM_MULTIARCH void join(const T* from, std::int64_t from_stride, std::int64_t n, T* into, \
                             std::int64_t stride) {                                            \
    join_of(from, from_stride, n, into, stride);                                               \
  }                                                                                            \
  FASTXM_MULTIARCH void bwd_tile(const Tile<T>& t, const Terms<T>& terms, T* out,              \
                                 std::int64_t stride) {                                        \
    bwd_tile_of(t, terms, out, stride);                                                        \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(double)
#undef FASTXM_INSTANCES
#define FASTXM_INSTANCES(E)                                                                      \
  FASTXM_MULTIARCH void kept_tile(const Tile<float>& t, const Terms<float>& terms,               \
                                  const Kept<E>& kept, float* out) {                             \
    kept_tile_of(t, terms, kept, out, kStrip);                                                   \
  }                                                                                              \
  FASTXM_MULTIARCH void tile_rows(const float* ds, std::int64_t rows, std::int64_t width, E* to, \
                                  std::int64_t stride) {                                         \
    rows_to(ds, rows, width, to, stride);                                                        \
  }                                                                                              \
  FASTXM_MULTIARCH void tile_steps(const float* ds, std::int64_t rows, std::int64_t width,       \
                                   E* panels, std::int64_t panel) {                              \
    steps_to(ds, rows, width, panels, panel);                                                    \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(bfloat16)
#undef FASTXM_INSTANCES

// rows that one thread takes of a strip: of few rows fewer, so that every thread has some. It
// follows from the sizes alone: sums are the same whatever the number of threads
template <class E>
std::int64_t chunk_of(std::int64_t rows) {
  return std::clamp(round_up((rows + 7) / 8, kTile<E>), kTile<E>, kChunk<E>);
}

// takes `count` parts, `part` apart, of the statistics of n rows or columns into `into` [5, stride]
template <class T>
void join_parts(const T* parts, std::int64_t count, std::int64_t part, std::int64_t part_stride,
                std::int64_t n, T* into, std::int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads)
  for (std::int64_t i = 0; i < n; i += kStrip)
    for (std::int64_t k = 0; k < count; ++k)
      join(parts + k * part + i, part_stride, std::min(kStrip, n - i), into + i, stride);
}

// what makes the products of a tile that begins in row i and column j
struct Products {
  Panels panels;  // y's columns
  const char* x;
  std::int64_t stride;  // bytes from row to row

  void operator()(const Tile<float>& t, std::int64_t i, std::int64_t j) const {
    multiply(panels, Left{x + i * stride, stride, 4}, t.rows, j, t.width, t.s, kStrip);
  }
};

// the tile of these rows from row i and column j on; scratch: for its logits
template <class T>
Tile<T> tile_at(const InfoNceBlock& b, std::int64_t i, std::int64_t rows, std::int64_t j,
                T* scratch) {
  const auto* row_labels = pointer<const std::int64_t>(b.row_labels);
  const auto* column_labels = pointer<const std::int64_t>(b.column_labels);
  return {scratch,
          b.products ? pointer<T>(b.products) + i * b.columns + j : scratch,
          b.products ? b.columns : kStrip,
          rows,
          std::min(kStrip, b.columns - j),
          b.target + i - j,
          pointer<const T>(b.row_factor) + i,
          pointer<const T>(b.column_factor) + j,
          row_labels ? row_labels + i : nullptr,
          column_labels ? column_labels + j : nullptr};
}

// f(tile, its first row, its first column, whether a chunk begins) for the tiles of each chunk of
// rows of each strip of columns
template <class T, class E, class F>
void for_each_tile(const InfoNceBlock& b, int threads, F f) {
  std::int64_t step = chunk_of<E>(b.rows);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (std::int64_t chunk = 0; chunk < b.rows; chunk += step)
    for (std::int64_t j = 0; j < b.columns; j += kStrip) {
      alignas(64) T scratch[kTile<E> * kStrip];
      std::int64_t end = std::min(b.rows, chunk + step);
      for (std::int64_t i = chunk; i < end; i += kTile<E>)
        f(tile_at(b, i, std::min(kTile<E>, end - i), j, scratch), i, j, i == chunk);
    }
}

// make(tile, its first row, its first column): its products, where they are not there yet
template <class T, class E, class Make>
void fwd(const InfoNceBlock& b, Make make, T* row_stats, std::int64_t row_stride, T* column_stats,
         Kept<E>* kept, int threads) {
  if (b.rows * b.columns < kSmall) threads = 1;
  std::int64_t strips = (b.columns + kStrip - 1) / kStrip;
  std::int64_t step = chunk_of<E>(b.rows), chunks = (b.rows + step - 1) / step;
  std::vector<T> rows(strips * kStatistics * b.rows),
      columns(chunks * kStatistics * strips * kStrip);
  for_each_tile<T, E>(
      b, threads, [&](const Tile<T>& t, std::int64_t i, std::int64_t j, bool first) {
        T* column = columns.data() + (i / step * strips + j / kStrip) * kStatistics * kStrip;
        for (std::int64_t k = 0; first && k < kStrip; ++k)
          store<T>({T(kNothing), 0, 0, 0, T(-INFINITY)}, column + k, kStrip);
        make(t, i, j);
        Kept<E>* own = kept ? kept + i / kTile<E> * strips + j / kStrip : nullptr;
        fwd_tile(t, rows.data() + j / kStrip * kStatistics * b.rows + i, b.rows, column, own);
        for (std::int64_t k = 0; k < t.rows; ++k) {
          std::int64_t at = t.target + k;
          if (at >= 0 && at < t.width)
            row_stats[kStatistics * row_stride + i + k] = t.s[k * kStrip + at];
        }
      });
  join_parts(rows.data(), strips, kStatistics * b.rows, b.rows, b.rows, row_stats, row_stride,
             threads);
  for (std::int64_t j = 0; j < b.columns; j += kStrip)
    join_parts(columns.data() + j * kStatistics, chunks, strips * kStatistics * kStrip, kStrip,
               std::min(kStrip, b.columns - j), column_stats + j, b.columns, threads);
}

template <class T, class Out>
void bwd(const InfoNceBlock& b, const Terms<T>& terms, Out* out, int threads) {
  if (b.rows * b.columns < kSmall) threads = 1;
  auto run = [&](const Tile<T>& t, std::int64_t i, std::int64_t j, bool) {
    Terms<T> here = terms;
    here.rows += i;
    if (terms.columns) here.columns += j;
    Out* to = out + i * b.columns + j;
    if constexpr (std::is_same_v<T, Out>) {
      bwd_tile(t, here, to, b.columns);
    } else {
      alignas(64) T values[kTallest * kStrip];
      bwd_tile(t, here, values, kStrip);
      round_rows(values, kStrip, t.rows, t.width, to, b.columns);
    }
  };
  for_each_tile<T, T>(b, threads, run);
}

}  // namespace
}  // namespace fastxm
