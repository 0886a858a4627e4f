// Rows of a tile of MMD by AVX-512, where all parts are of RBF and no parameter wants a gradient.
#pragma once

#include "cpu/avx512.h"
#include "cpu/mmd_parts.h"

#ifdef FASTXM_VECTORS

namespace fastxm {
namespace {

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

// writes weights of R rows rounded, and those of two beside each other, and leaves what was written
template <int R>
FASTXM_AVX512_BF16 FASTXM_INLINE void store_halves(__m512 (&w)[R], __m512i beside, bfloat16* out,
                                                   int64_t stride, std::uint32_t* pairs,
                                                   __mmask16 mask) {
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh(R > 1 ? w[R - 1] : _mm512_setzero_ps(), w[0]);
  const __m512i both = _mm512_permutexvar_epi16(beside, halves);
  _mm512_mask_storeu_epi32(pairs, mask, both);
  _mm256_mask_storeu_epi16(out, mask, _mm512_castsi512_si256(halves));
  w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  if constexpr (R > 1) {
    _mm256_mask_storeu_epi16(out + stride, mask, _mm512_extracti64x4_epi64(halves, 1));
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
  }
}

// one pass over the pairs of R rows, from products to weights
template <int R, bool kWeights, bool kHalves>
FASTXM_AVX512_BF16 void rbf_rows_avx512(const RbfRows& r) {
  constexpr int count = 4, across = count / R;  // vectors at a time: no exp waits for another
  constexpr std::int64_t most = 16 * across;
  __m512 potential[R], total[R], norm[R], weight[R], scale[R];
  for (int i = 0; i < R; ++i) {
    potential[i] = total[i] = _mm512_setzero_ps();
    norm[i] = _mm512_set1_ps(r.x_norms[i]);
    weight[i] = _mm512_set1_ps(r.x_weights[i]), scale[i] = _mm512_set1_ps(r.x_scales[i]);
  }
  const __m512i beside = evens_and_odds();
  for (int64_t j = 0; j < r.n; j += most) {
    __m512 d2[count], value[count], slope[count], e[count];
    __mmask16 mask[across];
    for (int v = 0; v < across; ++v)
      mask[v] = j + most <= r.n ? __mmask16{0xffff} : lanes(r.n - j - 16 * v);
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      const int v = k % across, i = k / across;
      const float* products = r.products + i * r.stride + j + 16 * v;
      const __m512 norms =
          _mm512_add_ps(norm[i], _mm512_maskz_loadu_ps(mask[v], r.norms + j + 16 * v));
      d2[k] = _mm512_fnmadd_ps(_mm512_set1_ps(2), _mm512_maskz_loadu_ps(mask[v], products), norms);
      d2[k] = _mm512_max_ps(_mm512_setzero_ps(), d2[k]);  // NaN stays
      value[k] = slope[k] = e[k] = _mm512_setzero_ps();
    }
    for (const Part<float>& part : r.parts) {
      const __m512 rate = _mm512_set1_ps(part.rate), height = _mm512_set1_ps(part.weight);
      const __m512 slant = _mm512_set1_ps(part.slant);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        if (part.power) {
          e[k] = _mm512_mul_ps(e[k], e[k]);
          e[k] = _mm512_mul_ps(e[k], e[k]);
        } else {
          e[k] = power_of_2(_mm512_mul_ps(rate, d2[k]), mask[k % across]);
        }
        value[k] = _mm512_fmadd_ps(height, e[k], value[k]);
        if (kWeights) slope[k] = _mm512_fmadd_ps(slant, e[k], slope[k]);
      }
    }
    if (r.own + R > j && r.own < j + most)
      for (int k = 0; k < count; ++k) {
        const int64_t at = r.own + k / across - j - k % across * 16;
        const __mmask16 other = lanes(at) ^ ~lanes(at + 1);
        value[k] = _mm512_mask_mov_ps(_mm512_set1_ps(r.own_value), other, value[k]);
        slope[k] = _mm512_maskz_mov_ps(other, slope[k]);
      }
#pragma GCC unroll 4
    for (int v = 0; v < across; ++v) {
      const int64_t at = j + 16 * v;
      const __m512 right = _mm512_maskz_loadu_ps(mask[v], r.right + at);
      __m512 sums = _mm512_maskz_loadu_ps(mask[v], r.potentials + at), w[R];
      for (int i = 0; i < R; ++i) {
        const __m512 own = value[i * across + v];
        potential[i] = _mm512_fmadd_ps(own, right, potential[i]);
        sums = _mm512_fmadd_ps(own, weight[i], sums);
        w[i] = _mm512_mul_ps(slope[i * across + v], right);
        w[i] = _mm512_mul_ps(w[i], scale[i]);
      }
      _mm512_mask_storeu_ps(r.potentials + at, mask[v], sums);
      if (!kWeights) continue;
      if constexpr (kHalves)
        store_halves<R>(w, beside, static_cast<bfloat16*>(r.out) + at, r.out_stride, r.pairs + at,
                        mask[v]);
      sums = _mm512_maskz_loadu_ps(mask[v], r.slopes + at);
      for (int i = 0; i < R; ++i) {
        float* out = static_cast<float*>(r.out) + i * r.out_stride + at;
        if constexpr (!kHalves) _mm512_mask_storeu_ps(out, mask[v], w[i]);
        total[i] = _mm512_add_ps(total[i], w[i]);
        sums = _mm512_add_ps(sums, w[i]);
      }
      _mm512_mask_storeu_ps(r.slopes + at, mask[v], sums);
    }
  }
  for (int i = 0; i < R; ++i) {
    r.x_potentials[i] += _mm512_reduce_add_ps(potential[i]);
    r.x_slopes[i] += _mm512_reduce_add_ps(total[i]);
  }
}

}  // namespace
}  // namespace fastxm

#endif
