// Rows of a tile of MMD by AVX2, where all parts are of RBF and no parameter wants a gradient.
#pragma once

#include <algorithm>

#include "cpu/avx2.h"
#include "cpu/mmd_parts.h"

#ifdef FASTXM_AVX2

namespace fastxm {
namespace {

// one pass over the pairs of one row, from products to weights
template <bool kWeights>
FASTXM_AVX2 void rbf_row_avx2(const RbfRows& r) {
  constexpr int count = 4;  // vectors at a time, so that no exp waits for another
  constexpr int64_t most = 8 * count;
  const __m256 norm = _mm256_set1_ps(*r.x_norms), two = _mm256_set1_ps(2);
  const __m256 weight = _mm256_set1_ps(*r.x_weights), scale = _mm256_set1_ps(*r.x_scales);
  __m256 potential = _mm256_setzero_ps(), total = _mm256_setzero_ps();
  alignas(32) float rest[3][most];  // the last columns, in whole vectors
  for (int64_t j = 0; j < r.n; j += most) {
    __m256 d2[count], value[count], slope[count], e[count];
    for (int v = 0; v < count; ++v) {
      const int64_t at = j + 8 * v;
      const __m256 norms = _mm256_add_ps(norm, load_first(r.n - at, r.norms + at));
      const __m256 products = load_first(r.n - at, r.products + at);
      // NaN stays
      d2[v] = _mm256_max_ps(_mm256_setzero_ps(), _mm256_fnmadd_ps(two, products, norms));
      value[v] = slope[v] = e[v] = _mm256_setzero_ps();
    }
    for (const Part<float>& part : r.parts) {
      const __m256 rate = _mm256_set1_ps(part.rate), height = _mm256_set1_ps(part.weight);
      const __m256 slant = _mm256_set1_ps(part.slant);
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        if (part.power) {
          e[v] = _mm256_mul_ps(e[v], e[v]);
          e[v] = _mm256_mul_ps(e[v], e[v]);
        } else {
          e[v] = power_of_2(_mm256_mul_ps(rate, d2[v]));
        }
        value[v] = _mm256_fmadd_ps(height, e[v], value[v]);
        if (kWeights) slope[v] = _mm256_fmadd_ps(slant, e[v], slope[v]);
      }
    }
    if (r.own >= j && r.own < j + most)
      for (int v = 0; v < count; ++v) {
        const __m256i after = first_lanes(r.own - j - 8 * v);
        const __m256 own =
            _mm256_castsi256_ps(_mm256_xor_si256(first_lanes(r.own + 1 - j - 8 * v), after));
        value[v] = _mm256_blendv_ps(value[v], _mm256_set1_ps(r.own_value), own);
        slope[v] = _mm256_andnot_ps(own, slope[v]);
      }
    const bool whole = j + most <= r.n;
    float *potentials = r.potentials + j, *slopes = r.slopes + j;
    float* out = static_cast<float*>(r.out) + (kWeights ? j : 0);
    if (!whole) {
      std::copy_n(potentials, r.n - j, rest[0]), std::copy_n(slopes, r.n - j, rest[1]);
      potentials = rest[0], slopes = rest[1], out = rest[2];
    }
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) {
      const int64_t at = 8 * v;
      const __m256 right = load_first(r.n - j - at, r.right + j + at);
      potential = _mm256_fmadd_ps(value[v], right, potential);
      _mm256_storeu_ps(potentials + at,
                       _mm256_fmadd_ps(value[v], weight, _mm256_loadu_ps(potentials + at)));
      if (!kWeights) continue;
      const __m256 w = _mm256_mul_ps(_mm256_mul_ps(slope[v], scale), right);
      _mm256_storeu_ps(out + at, w);
      total = _mm256_add_ps(total, w);
      _mm256_storeu_ps(slopes + at, _mm256_add_ps(_mm256_loadu_ps(slopes + at), w));
    }
    if (whole) continue;
    std::copy_n(potentials, r.n - j, r.potentials + j);
    std::copy_n(slopes, r.n - j, r.slopes + j);
    if (kWeights) std::copy_n(out, r.n - j, static_cast<float*>(r.out) + j);
  }
  *r.x_potentials += sum_of(potential);
  *r.x_slopes += sum_of(total);
}

}  // namespace
}  // namespace fastxm

#endif
