#include "cpu/info_nce.h"

#include <algorithm>
#include <vector>

#include "cpu/info_nce_tile.h"

namespace fastxm {
namespace {

constexpr std::int64_t kChunk = 10 * kTile;  // rows that one thread takes of a strip
constexpr std::int64_t kSmall = 1 << 14;     // entries below which threads cost more than they give

// OpenMP outlines its regions before functions are cloned for each instruction set: so the cloned
// functions take one tile, and the loops over tiles stand outside
#define FASTXM_INSTANCES(T)                                                                       \
  FASTXM_MULTIARCH void fwd_tile(const Tile<T>& t, T* row, std::int64_t row_stride, T* columns) { \
    fwd_tile_of(t, row, row_stride, columns);                                                     \
  }                                                                                               \
  FASTXM_MULTIARCH void bwd_tile(const Tile<T>& t, const Terms<T>& terms, T* out,                 \
                                 std::int64_t out_stride) {                                       \
    bwd_tile_of(t, terms, out, out_stride);                                                       \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(double)
#undef FASTXM_INSTANCES
FASTXM_MULTIARCH void bwd_tile(const Tile<float>& t, const Terms<float>& terms, bfloat16* out,
                               std::int64_t out_stride) {
  bwd_tile_of(t, terms, out, out_stride);
}

// takes `count` parts, `part` apart, of the statistics of n rows or columns into `into` [5, stride]
template <class T>
void join_parts(const T* parts, std::int64_t count, std::int64_t part, std::int64_t part_stride,
                std::int64_t n, T* into, std::int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads)
  for (std::int64_t i = 0; i < n; ++i) {
    Sums<T> sums = load(into + i, stride);
    for (std::int64_t k = 0; k < count; ++k)
      sums = join(sums, load(parts + k * part + i, part_stride));
    store(sums, into + i, stride);
  }
}

// f(tile, its first row, its first column, whether a chunk begins) for the tiles of each chunk of
// rows of each strip of columns
template <class T, class F>
void for_each_tile(const InfoNceBlock& b, int threads, F f) {
  const auto* row_labels = pointer<const std::int64_t>(b.row_labels);
  const auto* column_labels = pointer<const std::int64_t>(b.column_labels);
  std::int64_t element = b.bf16 ? 2 : sizeof(T);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (std::int64_t chunk = 0; chunk < b.rows; chunk += kChunk)
    for (std::int64_t j = 0; j < b.columns; j += kStrip) {
      alignas(64) T scratch[kTile * kStrip];
      std::int64_t width = std::min(kStrip, b.columns - j);
      std::int64_t end = std::min(b.rows, chunk + kChunk);
      for (std::int64_t i = chunk; i < end; i += kTile) {
        std::int64_t rows = std::min(kTile, end - i);
        T* products = b.products ? pointer<T>(b.products) + i * b.columns + j : scratch;
        std::int64_t stride = b.products ? b.columns : kStrip;
        if constexpr (sizeof(T) == 4) {
          if (b.panels)
            multiply({b.bf16 != 0, b.depth, b.panels},
                     pointer<const char>(b.x) + i * b.x_stride * element, b.x_stride, rows, j,
                     width, products, stride);
        }
        f(Tile<T>{scratch, products, stride, rows, width, b.target + i - j,
                  pointer<const T>(b.row_factor) + i, pointer<const T>(b.column_factor) + j,
                  row_labels ? row_labels + i : nullptr,
                  column_labels ? column_labels + j : nullptr},
          i, j, i == chunk);
      }
    }
}

template <class T>
void fwd(const InfoNceBlock& b, T* row_stats, std::int64_t row_stride, T* column_stats,
         int threads) {
  if (b.rows * b.columns < kSmall) threads = 1;
  std::int64_t strips = (b.columns + kStrip - 1) / kStrip;
  std::int64_t chunks = (b.rows + kChunk - 1) / kChunk;
  std::vector<T> rows(strips * kStatistics * b.rows),
      columns(chunks * kStatistics * strips * kStrip);
  for_each_tile<T>(b, threads, [&](const Tile<T>& t, std::int64_t i, std::int64_t j, bool first) {
    T* column = columns.data() + (i / kChunk * strips + j / kStrip) * kStatistics * kStrip;
    for (std::int64_t k = 0; first && k < kStrip; ++k)
      store<T>({T(kNothing), 0, 0, 0, T(-INFINITY)}, column + k, kStrip);
    fwd_tile(t, rows.data() + j / kStrip * kStatistics * b.rows + i, b.rows, column);
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
  for_each_tile<T>(b, threads, [&](const Tile<T>& t, std::int64_t i, std::int64_t j, bool) {
    Terms<T> here = terms;
    here.rows += i;
    if (terms.columns) here.columns += j;
    bwd_tile(t, here, out + i * b.columns + j, b.columns);
  });
}

}  // namespace

void info_nce_fwd_cpu(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                      std::uintptr_t row_stats, std::int64_t row_stride,
                      std::uintptr_t column_stats, int threads) {
  InfoNceBlock b = info_nce_block(sizes, addresses);
  auto run = [&](auto type) {
    using T = decltype(type);
    fwd(b, pointer<T>(row_stats), row_stride, pointer<T>(column_stats), threads);
  };
  b.float64 ? run(double()) : run(float());
}

void info_nce_bwd_cpu(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                      std::uintptr_t row_terms, std::int64_t row_stride,
                      std::uintptr_t column_terms, double smoothing, bool out_bf16,
                      std::uintptr_t out, int threads) {
  InfoNceBlock b = info_nce_block(sizes, addresses);
  auto run = [&](auto type, auto result) {
    using T = decltype(type);
    Terms<T> terms = {pointer<const T>(row_terms), pointer<const T>(column_terms), row_stride,
                      b.columns, static_cast<T>(smoothing)};
    bwd(b, terms, pointer<decltype(result)>(out), threads);
  };
  if (b.float64)
    run(double(), double());
  else if (out_bf16)
    run(float(), bfloat16());
  else
    run(float(), float());
}

}  // namespace fastxm
