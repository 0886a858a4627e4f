// Rows that are factors of the products of region-word scores, of float or bfloat16.
#pragma once

#include "cpu/region_word_rows.h"

namespace fastxm {
namespace {

using std::int64_t;

template <class From, class E>
FASTXM_INLINE void scale_row(const From* from, float factor, int64_t n, E* to) {
#ifdef FASTXM_VECTORS
  if constexpr (sizeof(E) == 2)  // tiles of bfloat16 are of machines that round it, or of none
    if (has_avx512()) return scale_avx512(from, factor, n, to);
#endif
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(factor * to_float(from[i]), to[i]);
}

template <class E>
FASTXM_INLINE void round_rows_of(const float* from, int64_t rows, int64_t n, E* to, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, from += n, to += width) {
    scale_row(from, 1, n, to);
    for (int64_t r = n; r < width; ++r) from_float(0.0f, to[r]);
  }
}

// to = rows times factors; may be the rows
template <class E>
FASTXM_INLINE void scale_rows_of(const E* from, const float* factors, int64_t rows, int64_t n,
                                 E* to) {
  for (int64_t i = 0; i < rows; ++i, from += n, to += n) scale_row(from, factors[i], n, to);
}

template <class E>
FASTXM_INLINE void squares_of(const E* rows, int64_t n, float* square, int64_t count) {
  for (int64_t i = 0; i < count; ++i, rows += n) square[i] = product_of(rows, rows, n);
}

// out = the gradient of rows x from that of x / norm
template <class E>
FASTXM_INLINE void through_norms_of(const float* grad, const E* x, const float* norm, int64_t rows,
                                    int64_t n, E* out) {
  for (int64_t i = 0; i < rows; ++i, grad += n, x += n, out += n) {
    const float scale = 1 / norm[i];
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < n; ++d) along += grad[d] * to_float(x[d]);
    // a row that short was not brought to norm 1
    along = norm[i] <= 1e-6f ? 0.0f : along * scale * scale;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) from_float(scale * (grad[d] - along * to_float(x[d])), out[d]);
  }
}

template <class E>
FASTXM_INLINE void add_rows_of(float* out, const float* factors, const E* rows, int64_t count,
                               int64_t n) {
  for (int64_t i = 0; i < count; ++i, rows += n, out += n) {
    const float factor = factors[i];
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[d] += factor * to_float(rows[d]);
  }
}

#define FASTXM_INSTANCES(E)                                                                      \
  FASTXM_MULTIARCH void round_rows(const float* from, int64_t rows, int64_t n, E* to,            \
                                   int64_t width) {                                              \
    round_rows_of(from, rows, n, to, width);                                                     \
  }                                                                                              \
  FASTXM_MULTIARCH void scale_rows(const E* from, const float* factors, int64_t rows, int64_t n, \
                                   E* to) {                                                      \
    scale_rows_of(from, factors, rows, n, to);                                                   \
  }                                                                                              \
  FASTXM_MULTIARCH void squares(const E* rows, int64_t n, float* square, int64_t count) {        \
    squares_of(rows, n, square, count);                                                          \
  }                                                                                              \
  FASTXM_MULTIARCH void through_norms(const float* grad, const E* x, const float* norm,          \
                                      int64_t rows, int64_t n, E* out) {                         \
    through_norms_of(grad, x, norm, rows, n, out);                                               \
  }                                                                                              \
  FASTXM_MULTIARCH void add_rows(float* out, const float* factors, const E* rows, int64_t count, \
                                 int64_t n) {                                                    \
    add_rows_of(out, factors, rows, count, n);                                                   \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(bfloat16)
#undef FASTXM_INSTANCES

}  // namespace
}  // namespace fastxm
