// Rows of a tile of MMD by AVX2, where all parts are of RBF and no parameter wants a gradient.
#pragma once

#include <vector>

#include "cpu/avx2.h"
#include "cpu/mmd_parts.h"

#ifdef FASTXM_AVX2

namespace fastxm {
namespace {

// values k and slopes w of n pairs, of squared distances s; read and written up to whole vectors
FASTXM_AVX2 inline void rbf_avx2(const std::vector<Part<float>>& parts, int64_t n, const float* s,
                                 float* k, float* w) {
  constexpr int count = 4;  // vectors at a time, so that no exp waits for another
  for (int64_t j = 0; j < n; j += 8 * count) {
    __m256 d2[count], value[count], slope[count], e[count];
    for (int v = 0; v < count; ++v) {
      d2[v] = _mm256_load_ps(s + j + 8 * v);
      value[v] = slope[v] = e[v] = _mm256_setzero_ps();
    }
    for (const Part<float>& part : parts) {
      const __m256 rate = _mm256_set1_ps(-part.shape), weight = _mm256_set1_ps(part.weight);
      const __m256 slant = _mm256_set1_ps(2 * part.shape * part.weight);
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        if (part.power) {
          e[v] = _mm256_mul_ps(e[v], e[v]);
          e[v] = _mm256_mul_ps(e[v], e[v]);
        } else {
          e[v] = exp_of_negative(_mm256_mul_ps(rate, d2[v]));
        }
        value[v] = _mm256_fmadd_ps(weight, e[v], value[v]);
        slope[v] = _mm256_fmadd_ps(slant, e[v], slope[v]);
      }
    }
    for (int v = 0; v < count; ++v) {
      _mm256_store_ps(k + j + 8 * v, value[v]);
      _mm256_store_ps(w + j + 8 * v, slope[v]);
    }
  }
}

}  // namespace
}  // namespace fastxm

#endif
