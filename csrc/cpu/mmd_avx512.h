// Rows of a tile of MMD by AVX-512, where all parts are of RBF and no parameter wants a gradient.
#pragma once

#include <vector>

#include "cpu/avx512.h"
#include "cpu/mmd_parts.h"

#ifdef FASTXM_VECTORS

namespace fastxm {
namespace {

// values k and slopes w of n pairs, of squared distances s
FASTXM_AVX512 inline void rbf_avx512(const std::vector<Part<float>>& parts, int64_t n,
                                     const float* s, float* k, float* w) {
  constexpr int count = 4;  // vectors at a time, so that no exp waits for another
  for (int64_t j = 0; j < n; j += 16 * count) {
    __m512 d2[count], value[count], slope[count], e[count];
    __mmask16 mask[count];
    for (int v = 0; v < count; ++v) {
      mask[v] = lanes(n - j - 16 * v);
      d2[v] = _mm512_maskz_loadu_ps(mask[v], s + j + 16 * v);
      value[v] = slope[v] = e[v] = _mm512_setzero_ps();
    }
    for (const Part<float>& part : parts) {
      const __m512 rate = _mm512_set1_ps(-part.shape), weight = _mm512_set1_ps(part.weight);
      const __m512 slant = _mm512_set1_ps(2 * part.shape * part.weight);
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        if (part.power) {
          e[v] = _mm512_mul_ps(e[v], e[v]);
          e[v] = _mm512_mul_ps(e[v], e[v]);
        } else {
          e[v] = exp_from(-87.33654f, _mm512_mul_ps(rate, d2[v]), mask[v]);
        }
        value[v] = _mm512_fmadd_ps(weight, e[v], value[v]);
        slope[v] = _mm512_fmadd_ps(slant, e[v], slope[v]);
      }
    }
    for (int v = 0; v < count; ++v) {
      _mm512_mask_storeu_ps(k + j + 16 * v, mask[v], value[v]);
      _mm512_mask_storeu_ps(w + j + 16 * v, mask[v], slope[v]);
    }
  }
}

// a row of weights w scale right, rounded into `out`, and beside the other row's of its pair;
// returns their sum, and adds them to `sums`
FASTXM_AVX512_BF16 inline float halves_avx512(int64_t n, const float* w, const float* right,
                                              float scale, bool second, bfloat16* out,
                                              std::uint32_t* pairs, float* sums) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(n - j);
    const __m512 weight = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w + j), factor),
                                        _mm512_maskz_loadu_ps(mask, right + j));
    const auto rounded = (__m256i)_mm512_cvtneps_pbh(weight);
    _mm256_mask_storeu_epi16(out + j, mask, rounded);
    const __m512i word = _mm512_cvtepu16_epi32(rounded), high = _mm512_slli_epi32(word, 16);
    const __m512i both =
        second ? _mm512_or_si512(_mm512_maskz_loadu_epi32(mask, pairs + j), high) : word;
    _mm512_mask_storeu_epi32(pairs + j, mask, both);
    const __m512 x = _mm512_castsi512_ps(high);
    total = _mm512_add_ps(total, x);
    _mm512_mask_storeu_ps(sums + j, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sums + j), x));
  }
  return _mm512_reduce_add_ps(total);
}

}  // namespace
}  // namespace fastxm

#endif
