#include "cpu/siglip.h"

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "numbers.h"

namespace fastxm {
namespace {

using Sums = std::array<double, 3>;  // of the loss, of ds times the product, of ds

// these sums of each column of a tile
struct Columns {
  alignas(64) float loss[kWidest] = {}, dscale[kWidest] = {}, dbias[kWidest] = {};
};

// log(1 + e) of e in [0, 1], from z = e / (2 + e): 2 atanh(z), z at most 1/3
FASTXM_INLINE float log1p_unit(float z) {
  const float z2 = z * z;
  float p = 1.0f / 13;
  p = std::fma(p, z2, 1.0f / 11);
  p = std::fma(p, z2, 1.0f / 9);
  p = std::fma(p, z2, 1.0f / 7);
  p = std::fma(p, z2, 1.0f / 5);
  p = std::fma(p, z2, 1.0f / 3);
  return 2 * std::fma(z * z2, p, z);
}

// One row of a tile: products [n] become scale ds in `to`; partner: which column is its positive,
// none if that is not below n. Adds to sums.
template <class E>
FASTXM_INLINE void pairs_of(const float* products, std::int32_t n, std::int32_t partner,
                            float scale, float bias, E* to, Columns& sums) {
  float *loss = sums.loss, *dscale = sums.dscale, *dbias = sums.dbias;
#pragma omp simd
  for (std::int32_t j = 0; j < n; ++j) {
    const float s = products[j] * scale + bias;
    const float u = j == partner ? -s : s;  // the loss is log(1 + e^u)
    const float e = exp_fast(u < 0 ? u : -u);
    const float both = 1 / ((1 + e) * (2 + e)), share = (2 + e) * both;  // 1 / (1 + e)
    const float sigmoid = u < 0 ? e * share : share;
    const float ds = j == partner ? -sigmoid : sigmoid;
    loss[j] += (u < 0 ? 0 : u) + log1p_unit(e * (1 + e) * both);
    dscale[j] += ds * products[j];
    dbias[j] += ds;
    from_float(scale * ds, to[j]);
  }
}

#define FASTXM_INSTANCE(E)                                                                    \
  FASTXM_MULTIARCH void pairs(const float* products, std::int64_t n, std::int64_t partner,    \
                              float scale, float bias, E* to, Columns& sums) {                \
    const auto place = partner < 0 || partner >= n ? -1 : static_cast<std::int32_t>(partner); \
    pairs_of(products, static_cast<std::int32_t>(n), place, scale, bias, to, sums);           \
  }
FASTXM_INSTANCE(float)
FASTXM_INSTANCE(bfloat16)
#undef FASTXM_INSTANCE

Sums added(const Columns& columns, std::int64_t n) {
  Sums sums = {};
  for (std::int64_t j = 0; j < n; ++j) {
    sums[0] += columns.loss[j];
    sums[1] += columns.dscale[j];
    sums[2] += columns.dbias[j];
  }
  return sums;
}

// Blocks of rows: ds of all their pairs, as rows for dx and as panels of columns for dy.
template <class E>
Sums run(const SiglipGiven& g, float scale, float bias, int threads) {
  const std::int64_t M = g.columns, D = g.depth, width = round_up(M, kStep<E>);
  const std::int64_t block = std::min(g.block, round_up(g.rows, kStep<E>));
  const bool derive = g.dx;
  const PartSize part = part_of(std::min(block, g.rows), M, sizeof(E) == 2, threads);
  const std::int64_t across = (M + part.columns - 1) / part.columns;
  const std::int64_t parts = across * ((block + part.rows - 1) / part.rows);
  const Panels y_columns = {sizeof(E) == 2, D, g.y_columns}, y = {sizeof(E) == 2, width, g.y_depth};
  Lines<E> rows(derive ? block * width : 0), columns(derive ? panels_size(M, block) : 0);
  std::vector<Sums> found(parts);
  Sums sums = {};
  for (std::int64_t first = 0; first < g.rows; first += block) {
    const std::int64_t n = std::min(block, g.rows - first), depth = round_up(n, kStep<E>);
    const E* x = pointer<const E>(g.x) + first * D;
    const Panels ds = panels_of(columns.data(), depth);
    std::fill(found.begin(), found.end(), Sums{});
#pragma omp parallel num_threads(threads)
    {
      Lines<float> products(part.rows * part.columns);
      Lines<E> unused(derive ? 0 : part.columns);
#pragma omp for collapse(2)
      for (std::int64_t i = 0; i < n; i += part.rows)
        for (std::int64_t j = 0; j < M; j += part.columns) {
          const std::int64_t high = std::min(part.rows, n - i),
                             wide = std::min(part.columns, M - j);
          multiply(y_columns, x + i * D, D, high, j, wide, products.data(), wide);
          E* to = derive ? rows.data() + i * width + j : unused.data();
          Columns own;
          for (std::int64_t k = 0; k < high; ++k)
            pairs(products.data() + k * wide, wide, g.paired ? first + i + k - j : -1, scale, bias,
                  derive ? to + k * width : to, own);
          found[i / part.rows * across + j / part.columns] = added(own, wide);
          if (!derive) continue;
          if (j + wide == M)
            for (std::int64_t k = 0; k < high; ++k)
              std::fill(to + k * width + wide, to + k * width + width - j, E{});
          pack_rows(panels_of(columns.data() + j * depth, depth), to, high, wide, width, i, 1);
        }
    }
    for (const Sums& own : found)
      for (int k = 0; k < 3; ++k) sums[k] += own[k];
    if (!derive) continue;
    for_each_part(n, D, sizeof(E) == 2, threads,
                  [&](std::int64_t i, std::int64_t high, std::int64_t d, std::int64_t wide) {
                    multiply(y, rows.data() + i * width, width, high, d, wide,
                             pointer<float>(g.dx) + (first + i) * D + d, D);
                  });
    const Panels some =
        panels_of(pointer<const E>(g.x_depth) + first * kPanel, depth, round_up(g.rows, kStep<E>));
#pragma omp parallel for num_threads(threads)
    for (std::int64_t j = 0; j < M; j += kPanel)
      multiply(some, columns_of<E>(ds, j), std::min(kPanel, M - j), 0, D,
               pointer<float>(g.dy) + j * D, D, first > 0);
  }
  return sums;
}

}  // namespace

Sums siglip_cpu(const SiglipNumbers& numbers, double scale, double bias, int threads) {
  const auto g = struct_of<SiglipGiven>(numbers);
  const auto factor = static_cast<float>(scale), shift = static_cast<float>(bias);
  return g.bf16 ? run<bfloat16>(g, factor, shift, threads) : run<float>(g, factor, shift, threads);
}

}  // namespace fastxm
