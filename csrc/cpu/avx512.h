// What kernels by AVX-512 share: lanes of a row's end, and exp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FASTXM_VECTORS

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace fastxm {
namespace {

#ifndef FASTXM_AVX512  // tests emulate these
#define FASTXM_AVX512 __attribute__((target("arch=x86-64-v4")))
// no instruction of AVX512-BF16 but those named comes of it: what is float32 runs on any AVX-512
#define FASTXM_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#endif

// the first n of a vector's lanes
FASTXM_AVX512 FASTXM_INLINE __mmask16 lanes(std::int64_t n) {
  return static_cast<__mmask16>((1u << std::clamp<std::int64_t>(n, 0, 16)) - 1);
}

// 2^x; 0 in other lanes, NaN stays
FASTXM_AVX512 FASTXM_INLINE __m512 power_of_2(__m512 x, __mmask16 mask) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(kPower[5]);
#pragma GCC unroll 5
  for (int k = 4; k >= 0; --k) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower[k]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(mask, p, x);
}

// as exp_fast; 0 in other lanes, and below `least`
FASTXM_AVX512 FASTXM_INLINE __m512 exp_from(float least, __m512 x, __mmask16 mask) {
  mask = _mm512_mask_cmp_ps_mask(mask, x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return power_of_2(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)), mask);
}

// an order of halves for which those of two vectors of 16 come to stand beside each other
FASTXM_AVX512 FASTXM_INLINE __m512i evens_and_odds() {
  alignas(64) std::uint16_t order[32];
  for (int k = 0; k < 32; ++k) order[k] = static_cast<std::uint16_t>(k / 2 + k % 2 * 16);
  return _mm512_load_si512(order);
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
