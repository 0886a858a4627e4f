#include "cpu/info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/info_nce_block.h"

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

template <class E>
Panels panels_of(const Lines<E>& lines, std::int64_t depth) {
  return {sizeof(E) == 2, depth, reinterpret_cast<std::uintptr_t>(lines.data())};
}

// as many rows as take `bytes`, each `width`: whole chunks
std::int64_t rows_of(std::int64_t bytes, std::int64_t width) {
  return std::max<std::int64_t>(1, bytes / std::max<std::int64_t>(1, width) / kChunk) * kChunk;
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
  std::int64_t step = rows_of(workspace, strips * kStatistics * sizeof(float));
  with_element(p, [&](auto element) {
    using E = decltype(element);
    Lines<E> columns_of_y(panels_size(p.columns, p.depth));
    const Panels columns = panels_of(columns_of_y, p.depth);
    pack_columns(columns, pointer<const E>(p.y), p.columns, p.depth, threads);
    auto* kept = pointer<Kept<E>>(p.kept);
    for (std::int64_t i = 0; i < p.rows; i += step)
      fwd(block_of(p, i, std::min(step, p.rows - i)), products_of(p, i, columns), row + i, p.rows,
          column, kept ? kept + i / kTile * strips : nullptr, threads);
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

// a factor of 0 is one that gradients can be divided by
std::vector<float> not_zero(std::uintptr_t factors, std::int64_t n) {
  std::vector<float> copy(pointer<const float>(factors), pointer<const float>(factors) + n);
  std::replace(copy.begin(), copy.end(), 0.0f, 1e-18f);
  return copy;
}

// gradients of the logits of a block's tiles: ds, and dsT its transpose
template <class E>
void gradient_block(const InfoNceBlock& b, const Products& make, const Terms<float>& terms,
                    const Kept<E>* kept, E* ds, std::int64_t stride, E* turned,
                    std::int64_t turned_stride, int threads) {
  std::int64_t strips = (b.columns + kStrip - 1) / kStrip;
  for_each_tile<float>(b, threads, [&](const Tile<float>& t, std::int64_t i, std::int64_t j, bool) {
    alignas(64) float values[kTile * kStride];
    Terms<float> here = terms;
    here.rows += i;
    if (terms.columns) here.columns += j;
    const Kept<E>* own = kept ? kept + i / kTile * strips + j / kStrip : nullptr;
    if (own && own->reference == own->reference) {
      kept_tile(t, here, *own, values);
    } else {
      make(t, i, j);
      bwd_tile(t, here, values, kStride);
    }
    spread_tile(values, t.rows, t.width, ds + i * stride + j, stride,
                turned + j * turned_stride + i, turned_stride);
  });
}

// gradients of Out: E, or float32
template <class E, class Out>
void gradients(InfoNceProblem p, const float* row_terms, const float* column_terms,
               const InfoNceGradients& out, double smoothing, std::int64_t workspace, int threads) {
  threads = threads_of(p, threads);
  const std::int64_t N = p.rows, M = p.columns, D = p.depth;
  auto *dx = pointer<Out>(out[0]), *dy = pointer<Out>(out[1]);
  auto a = not_zero(p.row_factor, N), b = not_zero(p.column_factor, M);
  p.row_factor = reinterpret_cast<std::uintptr_t>(a.data());
  p.column_factor = reinterpret_cast<std::uintptr_t>(b.data());
  std::int64_t strips = (M + kStrip - 1) / kStrip, tiles = (N + kTile - 1) / kTile * strips;
  const auto* kept = pointer<const Kept<E>>(p.kept);
  bool all = kept && std::none_of(kept, kept + tiles, [](const Kept<E>& tile) {
               return tile.reference != tile.reference;
             });
  Lines<E> columns_of_y(all ? 0 : panels_size(M, D));
  const Panels columns = panels_of(columns_of_y, D);
  if (!all) pack_columns(columns, pointer<const E>(p.y), M, D, threads);
  const std::int64_t height = round_up(M, kStep<E>);
  Lines<E> rows_of_y(panels_size(D, height));
  const Panels of_y = panels_of(rows_of_y, height);
  pack_rows(of_y, pointer<const E>(p.y), M, D, D, 0, threads);
  // rows of a block; lines that lie a power of two apart would share few places of the cache
  const std::int64_t n = std::min(rows_of(workspace, 2 * M * sizeof(E)), round_up(N, kTile));
  const std::int64_t stride = height + 32, turned_stride = n + 32;
  Lines<E> ds(n * stride), turned(M * turned_stride), rows_of_x(panels_size(D, n));
  // of dy, which bfloat16 would round with every block
  Lines<float> sum(sizeof(Out) == 2 && n < N ? M * D : 0);
  for (std::int64_t i = 0; i < N; i += n) {
    std::int64_t here = std::min(n, N - i);
    Terms<float> terms = {row_terms + i, column_terms, N, M, static_cast<float>(smoothing)};
    gradient_block(block_of(p, i, here), products_of(p, i, columns), terms,
                   kept ? kept + i / kTile * strips : nullptr, ds.data(), stride, turned.data(),
                   turned_stride, threads);
    for (std::int64_t k = 0; M < height && k < here; ++k) ds.data()[k * stride + M] = E{};
    const Panels of_x = panels_of(rows_of_x, round_up(here, kStep<E>));
    pack_rows(of_x, pointer<const E>(p.x) + i * D, here, D, D, 0, threads);
    times(ds.data(), stride, here, of_y, D, dx + i * D, false, threads);
    if (sum.data())
      times(turned.data(), turned_stride, M, of_x, D, sum.data(), i > 0, threads);
    else
      times(turned.data(), turned_stride, M, of_x, D, dy, i > 0, threads);
  }
  if (N == 0) std::fill(dy, dy + M * D, Out{});
  if constexpr (sizeof(Out) == 2)
    if (sum.data()) round_rows(sum.data(), D, M, D, dy, D);
  inner(pointer<const E>(p.x), dx, N, D, a.data(), pointer<float>(out[2]), threads);
  if (out[3]) inner(pointer<const E>(p.y), dy, M, D, b.data(), pointer<float>(out[3]), threads);
}

}  // namespace

std::array<std::int64_t, 4> info_nce_kept_cpu() {
  return {kTile, kStrip, sizeof(Kept<float>), sizeof(Kept<bfloat16>)};
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
                           std::uintptr_t column_terms, const InfoNceGradients& out,
                           double smoothing, std::int64_t workspace, int threads) {
  InfoNceProblem p = info_nce_problem(sizes, addresses);
  with_element(p, [&](auto element) {
    gradients<decltype(element), float>(p, pointer<const float>(row_terms),
                                        pointer<const float>(column_terms), out, smoothing,
                                        workspace, threads);
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
