// InfoNCE on the CPU: what is done to a block of rows of products. Formula: fastxm/ops/info_nce.py.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

// A block of products <x[i], y[j]> [rows, columns] and what turns them into logits
//     s[i, j] = row_factor[i] column_factor[j] products[i, j]
// of which row i has its positive in column target + i (none where there is no such column), and of
// which entries of one label in row_labels [rows] and column_labels [columns] (0 for none) are left
// out, but for the positive.
struct InfoNceBlock {
  std::int64_t float64, rows, columns, target;
  // where panels are given they times x make the products, which are written unless products is 0
  std::int64_t bf16, depth, x_stride;
  std::uintptr_t x, panels, products, row_factor, column_factor, row_labels, column_labels;
};

// statistics of a row or a column: a reference, and over the entries the sums of e = exp(s -
// reference), of e s and of s, and the maximum of s
constexpr std::int64_t kStatistics = 5;

using InfoNceSizes = std::array<std::int64_t, 7>;
using InfoNceAddresses = std::array<std::uintptr_t, 7>;

inline InfoNceBlock info_nce_block(const InfoNceSizes& s, const InfoNceAddresses& a) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], a[0], a[1], a[2], a[3], a[4], a[5], a[6]};
}

// row_stats [6, row_stride]: the five, and the positive, which is left as it is where there is
// none. column_stats [5, columns]. The block is taken into both.
void info_nce_fwd_cpu(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                      std::uintptr_t row_stats, std::int64_t row_stride,
                      std::uintptr_t column_stats, int threads);

// out [rows, columns], of bfloat16 if out_bf16, may be the products: column_factor[j] times the
// gradient of s. row_terms [3, row_stride] and column_terms [3, columns] (0 if only rows count):
// log-sum-exp, weight of the softmax, what smoothing takes from every entry. The positive loses (1
// - smoothing) of both weights.
void info_nce_bwd_cpu(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                      std::uintptr_t row_terms, std::int64_t row_stride,
                      std::uintptr_t column_terms, double smoothing, bool out_bf16,
                      std::uintptr_t out, int threads);

}  // namespace fastxm
