// Rows of region-word scores by AVX-512.
#pragma once

#include "cpu/avx512.h"

#ifdef FASTXM_VECTORS

namespace fastxm {
namespace {

constexpr int kAtOnce = 4;  // vectors at a time, so that no sum waits for the one before

FASTXM_AVX512 FASTXM_INLINE __m512 sum_of(const __m512 (&parts)[kAtOnce]) {
  return _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
}

// as softmax_regions
FASTXM_AVX512 inline float softmax_regions_avx512(const float* s, const float* beta, float* alpha,
                                                  int64_t R, float sharp) {
  const __m512 factor = _mm512_set1_ps(sharp);
  __m512 most = _mm512_set1_ps(-INFINITY), total[kAtOnce], dot[kAtOnce];
  for (int64_t r = 0; r < R; r += 16)
    most = _mm512_mask_max_ps(most, lanes(R - r), most,
                              _mm512_mul_ps(factor, load_wide(beta + r, lanes(R - r))));
  const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int v = 0; v < kAtOnce; ++v) total[v] = dot[v] = _mm512_setzero_ps();
  for (int64_t r = 0; r < R; r += 16 * kAtOnce)
#pragma GCC unroll 4
    for (int v = 0; v < kAtOnce; ++v) {
      const int64_t at = r + 16 * v;
      const __mmask16 mask = lanes(R - at);
      const __m512 x = _mm512_fmsub_ps(factor, load_wide(beta + at, mask), maximum);
      const __m512 e = exp_from(-87.33654f, x, mask);
      total[v] = _mm512_add_ps(total[v], e);
      store_rounded(alpha + at, e, mask);
    }
  const __m512 scale = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum_of(total)));
  for (int64_t r = 0; r < R; r += 16 * kAtOnce)
#pragma GCC unroll 4
    for (int v = 0; v < kAtOnce; ++v) {
      const int64_t at = r + 16 * v;
      const __mmask16 mask = lanes(R - at);
      const __m512 a = _mm512_mul_ps(scale, load_wide(alpha + at, mask));
      dot[v] = _mm512_fmadd_ps(a, load_wide(s + at, mask), dot[v]);
      store_rounded(alpha + at, a, mask);
    }
  return _mm512_reduce_add_ps(sum_of(dot));
}

// sum of a b
template <class E>
FASTXM_AVX512 inline float product_avx512(const E* a, const E* b, int64_t n) {
  __m512 sums[kAtOnce];
  for (int v = 0; v < kAtOnce; ++v) sums[v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16 * kAtOnce)
#pragma GCC unroll 4
    for (int v = 0; v < kAtOnce; ++v) {
      const int64_t at = i + 16 * v;
      const __mmask16 mask = lanes(n - at);
      sums[v] = _mm512_fmadd_ps(load_wide(a + at, mask), load_wide(b + at, mask), sums[v]);
    }
  return _mm512_reduce_add_ps(sum_of(sums));
}

// to = factor times a row, rounded
template <class From>
FASTXM_AVX512_BF16 inline void scale_avx512(const From* from, float factor, int64_t n,
                                            bfloat16* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    store_rounded(to + i, _mm512_mul_ps(_mm512_set1_ps(factor), load_wide(from + i, mask)), mask);
  }
}

}  // namespace
}  // namespace fastxm

#endif
