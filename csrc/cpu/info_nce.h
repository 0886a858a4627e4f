// InfoNCE on the CPU: what is done to a block of rows of logits. Formula: fastxm/ops/info_nce.py.
#pragma once

#include <cstdint>

namespace fastxm {

// s [rows, columns] holds logits, row i with its positive in column target + i. labels [columns] or
// 0: entries to leave out become -inf. Writes row_stats [3, row_stride]: log-sum-exp, positive,
// sum. Unless it is 0, takes the block into column_stats [3, columns]: maximum, sum of exp(s -
// maximum), sum. The plain sums are formed only if `sums`.
void info_nce_fwd_cpu(bool float64, std::uintptr_t s, std::int64_t rows, std::int64_t columns,
                      std::int64_t target, std::uintptr_t labels, std::uintptr_t row_stats,
                      std::int64_t row_stride, std::uintptr_t column_stats, bool sums, int threads);

// Turns logits s [rows, columns] into their gradient. row_terms [3, row_stride] and column_terms
// [3, columns] (0 if only rows count): log-sum-exp, weight of the softmax, what smoothing takes
// from every entry. The positive loses (1 - smoothing) of both weights.
void info_nce_bwd_cpu(bool float64, std::uintptr_t s, std::int64_t rows, std::int64_t columns,
                      std::int64_t target, std::uintptr_t labels, std::uintptr_t row_terms,
                      std::int64_t row_stride, std::uintptr_t column_terms, double smoothing,
                      int threads);

}  // namespace fastxm
