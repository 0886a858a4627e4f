// What kernels by AVX-512 share: lanes of a row's end, and exp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FASTXM_VECTORS

// GCC 12 takes what its own intrinsics leave undefined on purpose for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace fastxm {
namespace {

#define FASTXM_AVX512 __attribute__((target("arch=x86-64-v4")))
// no instruction of AVX512-BF16 but those named comes of it: what is float32 runs on any AVX-512
#define FASTXM_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))

// the first n of a vector's lanes
FASTXM_AVX512 FASTXM_INLINE __mmask16 lanes(std::int64_t n) {
  return static_cast<__mmask16>((1u << std::clamp<std::int64_t>(n, 0, 16)) - 1);
}

// as exp_fast; 0 in other lanes, and below `least`, which is above -87; NaN stays
FASTXM_AVX512 FASTXM_INLINE __m512 exp_from(float least, __m512 x, __mmask16 mask) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693145751953125f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(-1.42860682030941723e-6f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
  mask = _mm512_mask_cmp_ps_mask(mask, x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(mask, p, n);
}

// 16 numbers of E in float32, and back
FASTXM_AVX512 FASTXM_INLINE __m512 load_wide(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}
FASTXM_AVX512 FASTXM_INLINE __m512 load_wide(const bfloat16* from, __mmask16 mask) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
FASTXM_AVX512 FASTXM_INLINE void store_rounded(float* to, __m512 x, __mmask16 mask) {
  _mm512_mask_storeu_ps(to, mask, x);
}
FASTXM_AVX512_BF16 FASTXM_INLINE void store_rounded(bfloat16* to, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace
}  // namespace fastxm

#endif
