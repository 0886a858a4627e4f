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
  std::uintptr_t products, row_factor, column_factor, row_labels, column_labels;
};

// statistics of a row or a column: a reference, and over the entries the sums of e = exp(s -
// reference), of e s and of s, and the maximum of s
constexpr std::int64_t kStatistics = 5;

using InfoNceSizes = std::array<std::int64_t, 4>;
using InfoNceAddresses = std::array<std::uintptr_t, 5>;

inline InfoNceBlock info_nce_block(const InfoNceSizes& s, const InfoNceAddresses& a) {
  return {s[0], s[1], s[2], s[3], a[0], a[1], a[2], a[3], a[4]};
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

// All logits of rows x [rows, depth] and y [columns, depth], contiguous, of float32, or of bfloat16
// and an even depth; rest as above. kept: 0, or what `info_nce_kept_cpu` tells for each tile, which
// the forward writes and the backward reads.
struct InfoNceProblem {
  std::int64_t bf16, rows, columns, depth, target;
  std::uintptr_t x, y, row_factor, column_factor, row_labels, column_labels, kept;
};
using InfoNceProblemSizes = std::array<std::int64_t, 5>;
using InfoNceProblemAddresses = std::array<std::uintptr_t, 7>;

inline InfoNceProblem info_nce_problem(const InfoNceProblemSizes& s,
                                       const InfoNceProblemAddresses& a) {
  return {s[0], s[1], s[2], s[3], s[4], a[0], a[1], a[2], a[3], a[4], a[5], a[6]};
}

// columns of a tile; its rows, and bytes of a kept one, of float32 and of bfloat16
std::array<std::int64_t, 5> info_nce_kept_cpu();

// row_stats [6, rows] and column_stats [5, columns], as above. workspace: bytes to keep within
void info_nce_sums_cpu(const InfoNceProblemSizes& sizes, const InfoNceProblemAddresses& addresses,
                       std::uintptr_t row_stats, std::uintptr_t column_stats,
                       std::int64_t workspace, int threads);

// results: losses [rows]; log-sum-exps, entropies and hits of rows [3, rows] and, 0 if only rows
// count, of columns [3, columns]. counts: of each row's candidates, or 0 for all
void info_nce_losses_cpu(const InfoNceProblemSizes& sizes, const InfoNceProblemAddresses& addresses,
                         const std::array<std::uintptr_t, 3>& results, double smoothing,
                         std::uintptr_t counts, std::int64_t workspace, int threads);

// 1 / |row|, at most 1e6, of rows x [rows, depth] and then of y [columns, depth]: [rows + columns]
// of float32. sizes: whether they are of bfloat16, rows, columns, depth
void info_nce_rnorms_cpu(const std::array<std::int64_t, 4>& sizes, std::uintptr_t x,
                         std::uintptr_t y, std::uintptr_t rnorms, int threads);

// dx = g y and dy = g^T x, of float32, from the terms of info_nce_bwd_cpu
void info_nce_sums_bwd_cpu(const InfoNceProblemSizes& sizes,
                           const InfoNceProblemAddresses& addresses, std::uintptr_t row_terms,
                           std::uintptr_t column_terms,
                           const std::array<std::uintptr_t, 2>& gradients, double smoothing,
                           std::int64_t workspace, int threads);

// dx and dy, rnorms or 0, and along [rows]: see fastxm/ops/info_nce_rows.py
using InfoNceGradients = std::array<std::uintptr_t, 4>;
// gradients of x and y, of their dtype, and along from the gradient of each loss, dloss_stride
// apart, and all log-sum-exps
void info_nce_losses_bwd_cpu(const InfoNceProblemSizes& sizes,
                             const InfoNceProblemAddresses& addresses, std::uintptr_t dloss,
                             std::int64_t dloss_stride, std::uintptr_t row_lse,
                             std::uintptr_t column_lse, const InfoNceGradients& gradients,
                             double smoothing, std::uintptr_t counts, std::int64_t workspace,
                             int threads);

}  // namespace fastxm
