#include "cpu/info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/info_nce_block.h"
#include "cpu/info_nce_gradients.h"

namespace fastxm {
namespace {

template <class F>
void with_element(const InfoNceProblem& p, F f) {
  p.bf16 ? f(bfloat16()) : f(float());
}

// rows from `first`, n of them
InfoNceBlock block_of(const InfoNceProblem& p, std::int64_t first, std::int64_t n) {
  std::uintptr_t labels = p.row_labels ? p.row_labels + 8 * first : 0;
  return {0,
          n,
          p.columns,
          p.target + first,
          0,
          p.row_factor + 4 * first,
          p.column_factor,
          labels,
          p.column_labels};
}

// their products with y, of which these are the columns
Products products_of(const InfoNceProblem& p, std::int64_t first, const Panels& columns) {
  std::int64_t stride = p.depth * (p.bf16 ? 2 : 4);
  return {columns, pointer<const char>(p.x) + first * stride, stride};
}

// as many rows as take `bytes`, each `width`: whole chunks
template <class E>
std::int64_t rows_of(std::int64_t bytes, std::int64_t width) {
  const std::int64_t chunks = bytes / std::max<std::int64_t>(1, width) / kChunk<E>;
  return std::max<std::int64_t>(1, chunks) * kChunk<E>;
}

int threads_of(const InfoNceProblem& p, int threads) {
  return p.rows * p.columns < kSmall ? 1 : threads;
}

void sums(const InfoNceProblem& p, float* row, float* column, std::int64_t workspace, int threads) {
  threads = threads_of(p, threads);
  const Sums<float> nothing = {float(kNothing), 0, 0, 0, -INFINITY};
  for (std::int64_t i = 0; i < p.rows; ++i) store(nothing, row + i, p.rows);
  for (std::int64_t j = 0; j < p.columns; ++j) store(nothing, column + j, p.columns);
  std::int64_t strips = (p.columns + kStrip - 1) / kStrip;
  with_element(p, [&](auto element) {
    using E = decltype(element);
    std::int64_t step = rows_of<E>(workspace, strips * kStatistics * sizeof(float));
    Lines<E> columns_of_y(panels_size(p.columns, p.depth));
    const Panels columns = panels_of(columns_of_y.data(), p.depth);
    pack_columns(columns, pointer<const E>(p.y), p.columns, p.depth, threads);
    auto* kept = pointer<Kept<E>>(p.kept);
    const std::int64_t tiles = (p.rows + kTile<E> - 1) / kTile<E> * strips;
    if (kept) prefer_large_pages(kept, tiles * sizeof(Kept<E>));
    for (std::int64_t i = 0; i < p.rows; i += step)
      fwd(block_of(p, i, std::min(step, p.rows - i)), products_of(p, i, columns), row + i, p.rows,
          column, kept ? kept + i / kTile<E> * strips : nullptr, threads);
  });
}

// losses, or the mean of them and those that are there; log-sum-exps, entropies, hits
void finish(const float* sums, const float* positives, std::int64_t n, double smoothing,
            const float* counts, std::int64_t candidates, float* losses, bool halve,
            float* statistics) {
  for (std::int64_t i = 0; i < n; ++i) {
    Sums<float> s = load(sums + i, n);
    float lse = s.reference + std::log(s.exps), positive = positives[i], loss = lse - positive;
    float count = counts ? counts[i] : static_cast<float>(std::max<std::int64_t>(1, candidates));
    if (smoothing) loss += static_cast<float>(smoothing) * (positive - s.plain / count);
    losses[i] = halve ? (losses[i] + loss) / 2 : loss;
    statistics[i] = lse;
    statistics[n + i] = lse - s.dots / s.exps;
    statistics[2 * n + i] = positive >= s.top ? 1.0f : 0.0f;
  }
}

// terms [3, n] from the gradients of losses
std::vector<float> terms_of(const float* lse, const float* dloss, std::int64_t stride,
                            std::int64_t n, float share, double smoothing, const float* counts,
                            std::int64_t candidates) {
  std::vector<float> terms(3 * n);
  for (std::int64_t i = 0; i < n; ++i) {
    float count = counts ? counts[i] : static_cast<float>(std::max<std::int64_t>(1, candidates));
    float weight = dloss[i * stride] * share;
    terms[i] = lse[i], terms[n + i] = weight;
    terms[2 * n + i] = static_cast<float>(smoothing) * weight / count;
  }
  return terms;
}

// gradients of Out: E, or float32
template <class E, class Out>
void gradients(const InfoNceProblem& p, const float* row_terms, const float* column_terms,
               const InfoNceGradients& out, double smoothing, std::int64_t workspace, int threads) {
  threads = threads_of(p, threads);
  const std::int64_t N = p.rows, M = p.columns, D = p.depth;
  auto *dx = pointer<Out>(out[0]), *dy = pointer<Out>(out[1]);
  const auto* rnorms = pointer<const float>(out[2]);
  const Finish<E> end_x = {pointer<const E>(p.x), rnorms, pointer<float>(out[3]), D};
  const Finish<E> end_y = {pointer<const E>(p.y), rnorms ? rnorms + N : nullptr, nullptr, D};
  const std::int64_t strips = (M + kStrip - 1) / kStrip;
  const std::int64_t tiles = (N + kTile<E> - 1) / kTile<E> * strips;
  auto* kept = pointer<Kept<E>>(p.kept);
  const bool all = kept && std::none_of(kept, kept + tiles, [](const Kept<E>& tile) {
                     return tile.reference != tile.reference;
                   });
  Lines<E> columns_of_y(all ? 0 : panels_size(M, D));
  const Panels columns = panels_of(columns_of_y.data(), D);
  if (!all) pack_columns(columns, pointer<const E>(p.y), M, D, threads);
  // where nothing is kept: as many rows as `workspace` holds gradients of, or as the product with x
  // takes at a time
  const std::int64_t width = strips * kApart * static_cast<std::int64_t>(sizeof(E));
  const std::int64_t most = workspace / std::max<std::int64_t>(1, width) / kRowsAtOnce<E>;
  const std::int64_t n = kept ? N : std::min(N, std::max<std::int64_t>(1, most) * kRowsAtOnce<E>);
  const LeftRows<E> left(kept ? 0 : n, M);
  const RowProducts<E> of_y(pointer<const E>(p.y), M, D, threads);
  ColumnProducts<E, Out> of_x(dy, M, D);
  for (std::int64_t i = 0; i < N; i += n) {
    const std::int64_t here = std::min(n, N - i);
    const Terms<float> terms = {row_terms + i, column_terms, N, M, static_cast<float>(smoothing)};
    const InfoNceBlock block = block_of(p, i, here);
    const LogitGradients<E> ds = {block, products_of(p, i, columns), terms, kept, strips};
    of_x.add(ds, pointer<const E>(p.x) + i * D, kept ? nullptr : &left, i > 0, threads);
    if (kept)
      of_y.multiply(MadeRows<E>{ds}, here, dx + i * D, end_x, i, threads);
    else
      of_y.multiply(left, here, dx + i * D, end_x, i, threads);
  }
  if (N == 0)
    std::fill(dy, dy + M * D, Out{});
  else
    of_x.finish(end_y, threads);
}

}  // namespace

std::array<std::int64_t, 5> info_nce_kept_cpu() {
  return {kStrip, kTile<float>, sizeof(Kept<float>), kTile<bfloat16>, sizeof(Kept<bfloat16>)};
}

void info_nce_rnorms_cpu(const std::array<std::int64_t, 4>& sizes, std::uintptr_t x,
                         std::uintptr_t y, std::uintptr_t to, int threads) {
  const std::int64_t D = sizes[3];
  auto of = [&](auto* rows, std::int64_t count, float* out) {
#pragma omp parallel for num_threads(count* D < kSmall ? 1 : threads)
    for (std::int64_t i = 0; i < count; i += kTallest)
      rnorms(rows + i * D, std::min(kTallest, count - i), D, out + i);
  };
  auto run = [&](auto element) {
    using E = const decltype(element);
    of(pointer<E>(x), sizes[1], pointer<float>(to));
    of(pointer<E>(y), sizes[2], pointer<float>(to) + sizes[1]);
  };
  sizes[0] ? run(bfloat16()) : run(float());
}

void info_nce_sums_cpu(const InfoNceProblemSizes& sizes, const InfoNceProblemAddresses& addresses,
                       std::uintptr_t row_stats, std::uintptr_t column_stats,
                       std::int64_t workspace, int threads) {
  sums(info_nce_problem(sizes, addresses), pointer<float>(row_stats), pointer<float>(column_stats),
       workspace, threads);
}

void info_nce_losses_cpu(const InfoNceProblemSizes& sizes, const InfoNceProblemAddresses& addresses,
                         const std::array<std::uintptr_t, 3>& results, double smoothing,
                         std::uintptr_t counts, std::int64_t workspace, int threads) {
  InfoNceProblem p = info_nce_problem(sizes, addresses);
  std::vector<float> row(6 * p.rows), column(kStatistics * p.columns);
  sums(p, row.data(), column.data(), workspace, threads);
  const float* positives = row.data() + kStatistics * p.rows;
  auto [losses, of_rows, of_columns] = results;
  finish(row.data(), positives, p.rows, smoothing, pointer<const float>(counts), p.columns,
         pointer<float>(losses), false, pointer<float>(of_rows));
  if (of_columns)
    finish(column.data(), positives, p.columns, smoothing, pointer<const float>(counts), p.columns,
           pointer<float>(losses), true, pointer<float>(of_columns));
}

void info_nce_sums_bwd_cpu(const InfoNceProblemSizes& sizes,
                           const InfoNceProblemAddresses& addresses, std::uintptr_t row_terms,
                           std::uintptr_t column_terms, const std::array<std::uintptr_t, 2>& out,
                           double smoothing, std::int64_t workspace, int threads) {
  InfoNceProblem p = info_nce_problem(sizes, addresses);
  with_element(p, [&](auto element) {
    gradients<decltype(element), float>(p, pointer<const float>(row_terms),
                                        pointer<const float>(column_terms), {out[0], out[1], 0, 0},
                                        smoothing, workspace, threads);
  });
}

void info_nce_losses_bwd_cpu(const InfoNceProblemSizes& sizes,
                             const InfoNceProblemAddresses& addresses, std::uintptr_t dloss,
                             std::int64_t dloss_stride, std::uintptr_t row_lse,
                             std::uintptr_t column_lse, const InfoNceGradients& out,
                             double smoothing, std::uintptr_t counts, std::int64_t workspace,
                             int threads) {
  InfoNceProblem p = info_nce_problem(sizes, addresses);
  auto terms = [&](std::uintptr_t lse, std::int64_t n) {
    return lse ? terms_of(pointer<const float>(lse), pointer<const float>(dloss), dloss_stride, n,
                          column_lse ? 0.5f : 1.0f, smoothing, pointer<const float>(counts),
                          p.columns)
               : std::vector<float>();
  };
  std::vector<float> row = terms(row_lse, p.rows), column = terms(column_lse, p.columns);
  with_element(p, [&](auto element) {
    using E = decltype(element);
    gradients<E, E>(p, row.data(), column_lse ? column.data() : nullptr, out, smoothing, workspace,
                    threads);
  });
}

void info_nce_fwd_cpu(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                      std::uintptr_t row_stats, std::int64_t row_stride,
                      std::uintptr_t column_stats, int threads) {
  InfoNceBlock b = info_nce_block(sizes, addresses);
  auto run = [&](auto type) {
    using T = decltype(type);
    auto there = [](const Tile<T>&, std::int64_t, std::int64_t) {};
    fwd<T, float>(b, there, pointer<T>(row_stats), row_stride, pointer<T>(column_stats), nullptr,
                  threads);
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
