// What kernels by AVX2 share: lanes of a row's end, and exp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace fastxm {
namespace {

#define FASTXM_AVX2 __attribute__((target("arch=x86-64-v3")))

// the first n of eight lanes
FASTXM_AVX2 FASTXM_INLINE __m256i first_lanes(std::int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto count = static_cast<int>(std::clamp<std::int64_t>(n, 0, 8));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
}

// the first n numbers, and 0
FASTXM_AVX2 FASTXM_INLINE __m256 load_first(std::int64_t n, const float* from) {
  return n >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(n));
}

FASTXM_AVX2 FASTXM_INLINE float sum_of(__m256 x) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, x);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// 2^x of numbers that are not above 0; below 2^-126 of them that, NaN stays
FASTXM_AVX2 FASTXM_INLINE __m256 power_of_2(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-126), x);
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kPower[5]);
#pragma GCC unroll 5
  for (int k = 4; k >= 0; --k) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kPower[k]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

}  // namespace
}  // namespace fastxm

#endif
