// InfoNCE on a GPU, over device addresses and on a stream. Formula: fastxm/ops/info_nce.py.
#pragma once

#include "../cpu/info_nce.h"

namespace fastxm {

// how many numbers info_nce_fwd_cuda needs as its workspace for a block
std::int64_t info_nce_workspace_cuda(std::int64_t rows, std::int64_t columns);

// the passes of cpu/info_nce.h over a block of products that is there: panels are no part of it
void info_nce_fwd_cuda(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                       std::uintptr_t row_stats, std::int64_t row_stride,
                       std::uintptr_t column_stats, std::uintptr_t workspace,
                       std::uintptr_t stream);
void info_nce_bwd_cuda(const InfoNceSizes& sizes, const InfoNceAddresses& addresses,
                       std::uintptr_t row_terms, std::int64_t row_stride,
                       std::uintptr_t column_terms, double smoothing, bool out_bf16,
                       std::uintptr_t out, std::uintptr_t stream);

// All of a problem with at most 512 rows of y and no more of x. Factors, labels and the positives'
// columns as in InfoNceBlock; counts [rows]: candidates of each row, or 0 if all are.
struct InfoNceSmall {
  std::int64_t dtype;  // of x and y: float32, bfloat16, float16, float64
  std::int64_t rows, columns, depth, target;
  std::uintptr_t x, y, row_factor, column_factor, row_labels, column_labels, counts;
  // loss [rows], row_stats [3, rows] and column_stats [3, columns] (0 if only rows count): results;
  // or, where the gradients are, the loss's cotangent and the log-sum-exps
  std::uintptr_t loss, row_stats, column_stats;
  // rnorms (0 where lengths count), gradients and along: see fastxm/ops/info_nce_rows.py
  std::uintptr_t rnorms, dx, dy, along;
};

using InfoNceSmallSizes = std::array<std::int64_t, 5>;
using InfoNceSmallAddresses = std::array<std::uintptr_t, 14>;

inline InfoNceSmall info_nce_small(const InfoNceSmallSizes& s, const InfoNceSmallAddresses& a) {
  return {s[0], s[1], s[2], s[3], s[4], a[0],  a[1],  a[2],  a[3], a[4],
          a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]};
}

void info_nce_small_cuda(const InfoNceSmallSizes& sizes, const InfoNceSmallAddresses& addresses,
                         double smoothing, std::uintptr_t stream);

// Rows one by one: see fastxm/ops/info_nce_rows.py. Of x [rows, depth] and y [columns, depth],
// whose dtype, rows, columns and depth `sizes` tell: rnorms [rows + columns].
using InfoNceRowsSizes = std::array<std::int64_t, 4>;
void info_nce_rnorms_cuda(const InfoNceRowsSizes& sizes, std::uintptr_t x, std::uintptr_t y,
                          std::uintptr_t rnorms, std::uintptr_t stream);

// sizes: dtype of x and of the result, rows, depth, distance of the rows of dx. addresses: x, dx
// (wide), rnorms [rows] or 0, the result, along [rows].
void info_nce_finish_cuda(const InfoNceRowsSizes& sizes,
                          const std::array<std::uintptr_t, 5>& addresses, std::uintptr_t stream);

}  // namespace fastxm
