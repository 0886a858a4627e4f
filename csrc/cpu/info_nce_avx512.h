// Tiles of InfoNCE without labels by AVX-512, a panel's columns at a time, so that sums over them
// stay in registers; elsewhere the loops of info_nce_rows.h.
#pragma once

#include "cpu/avx512.h"
#include "cpu/info_nce_products.h"
#include "cpu/info_nce_rows.h"

namespace fastxm {
namespace {

#ifdef FASTXM_VECTORS

// columns of a panel that a tile has
struct Lanes {
  static constexpr int count = 4;
  __mmask16 of[count];

  FASTXM_AVX512 explicit FASTXM_INLINE Lanes(std::int64_t width) {
    for (int v = 0; v < count; ++v) of[v] = lanes(width - 16 * v);
  }
};

constexpr std::int64_t kAhead = 2048;  // bytes: what is kept of a tile is read from far away

// as of one number; 0 in other lanes
FASTXM_AVX512 FASTXM_INLINE __m512 probability(__m512 x, __mmask16 mask) {
  return exp_from(-69, x, mask);
}

FASTXM_AVX512 void scale_tile_avx512(const Tile<float>& t, float* row_top, float* column_top) {
  const __m512 nothing = _mm512_set1_ps(-INFINITY);
  __m512 of_rows[kTallest];
  for (__m512& top : of_rows) top = nothing;
  for (std::int64_t j = 0; j < t.width; j += kPanel) {
    const Lanes part(t.width - j);
    __m512 factors[Lanes::count], top[Lanes::count];
    for (int v = 0; v < Lanes::count; ++v) {
      factors[v] = _mm512_maskz_loadu_ps(part.of[v], t.column_factor + j + 16 * v);
      top[v] = nothing;
    }
    for (std::int64_t i = 0; i < t.rows; ++i) {
      const float* from = t.products + i * t.stride + j;
      const __m512 factor = _mm512_set1_ps(t.row_factor[i]);
      __m512 of_row = of_rows[i];
#pragma GCC unroll 4
      for (int v = 0; v < Lanes::count; ++v) {
        __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(part.of[v], from + 16 * v),
                                 _mm512_mul_ps(factor, factors[v]));
        _mm512_mask_storeu_ps(t.s + i * kStrip + j + 16 * v, part.of[v], s);
        of_row = _mm512_mask_max_ps(of_row, part.of[v], s, of_row);  // NaN counts for nothing
        top[v] = _mm512_max_ps(s, top[v]);
      }
      of_rows[i] = of_row;
    }
    for (int v = 0; v < Lanes::count; ++v)
      _mm512_mask_storeu_ps(column_top + j + 16 * v, part.of[v], top[v]);
  }
  for (std::int64_t i = 0; i < t.rows; ++i) row_top[i] = _mm512_reduce_max_ps(of_rows[i]);
}

template <class E>
FASTXM_AVX512_BF16 void shared_sums_avx512(const Tile<float>& t,
                                           const References<float>& references, float* row,
                                           std::int64_t row_stride, ColumnSums<float>& columns,
                                           E* keep) {
  struct {
    __m512 exps, dots, plain;
  } rows[kTallest] = {};
  for (std::int64_t j = 0; j < t.width; j += kPanel) {
    const Lanes part(t.width - j);
    __m512 exps[Lanes::count] = {}, dots[Lanes::count] = {}, plain[Lanes::count] = {};
    for (std::int64_t i = 0; i < t.rows; ++i) {
      auto here = rows[i];
      const __m512 own = _mm512_set1_ps(references.own[i]);
      const __m512 shift = _mm512_set1_ps(references.shift[i]);
#pragma GCC unroll 4
      for (int v = 0; v < Lanes::count; ++v) {
        const __m512 s = _mm512_maskz_loadu_ps(part.of[v], t.s + i * kStrip + j + 16 * v);
        __m512 e = probability(_mm512_sub_ps(s, own), part.of[v]);
        here.exps = _mm512_add_ps(here.exps, e), here.dots = _mm512_fmadd_ps(e, s, here.dots);
        here.plain = _mm512_add_ps(here.plain, s), plain[v] = _mm512_add_ps(plain[v], s);
        e = _mm512_mul_ps(e, shift);
        exps[v] = _mm512_add_ps(exps[v], e), dots[v] = _mm512_fmadd_ps(e, s, dots[v]);
        if (keep) store_rounded(keep + j * kTile<E> + i * kPanel + 16 * v, e, part.of[v]);
      }
      rows[i] = here;
    }
    for (int v = 0; v < Lanes::count; ++v) {
      _mm512_store_ps(columns.exps + j + 16 * v, exps[v]);
      _mm512_store_ps(columns.dots + j + 16 * v, dots[v]);
      _mm512_store_ps(columns.plain + j + 16 * v, plain[v]);
    }
  }
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const float own = references.own[i];
    store<float>({own, _mm512_reduce_add_ps(rows[i].exps), _mm512_reduce_add_ps(rows[i].dots),
                  _mm512_reduce_add_ps(rows[i].plain), own},
                 row + i, row_stride);
  }
}

template <class E>
FASTXM_AVX512_BF16 void shared_gradient_avx512(const Tile<float>& t, const float* references,
                                               const Shares<float>& shares, const E* kept,
                                               float* out, std::int64_t stride) {
  const __m512 least = _mm512_set1_ps(1e-36f);
  for (std::int64_t j = 0; j < t.width; j += kPanel) {
    const Lanes part(t.width - j);
    __m512 factors[Lanes::count], share[Lanes::count], even[Lanes::count];
    for (int v = 0; v < Lanes::count; ++v) {
      factors[v] = _mm512_maskz_loadu_ps(part.of[v], t.column_factor + j + 16 * v);
      share[v] = _mm512_load_ps(shares.columns + j + 16 * v);
      even[v] = _mm512_load_ps(shares.even_columns + j + 16 * v);
    }
    for (std::int64_t i = 0; i < t.rows; ++i) {
      const __m512 row_share = _mm512_set1_ps(shares.rows[i]);
      const __m512 row_even = _mm512_set1_ps(shares.even_rows[i]);
      const __m512 factor = _mm512_set1_ps(t.row_factor[i]);
      const __m512 own = _mm512_set1_ps(kept ? 0 : references[i]);
      const __m512 shift = _mm512_set1_ps(shares.shifts[i]);
#pragma GCC unroll 4
      for (int v = 0; v < Lanes::count; ++v) {
        const __m512 both = _mm512_mul_ps(factor, factors[v]);
        __m512 e;
        if (kept) {
          const E* at = kept + j * kTile<E> + i * kPanel + 16 * v;
          if (v * sizeof(E) % 4 == 0) _mm_prefetch(at + kAhead / sizeof(E), _MM_HINT_T0);
          e = load_wide(at, part.of[v]);
        } else {
          const float* from = t.products + i * t.stride + j + 16 * v;
          const __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(part.of[v], from), both);
          e = probability(_mm512_sub_ps(s, own), part.of[v]);
        }
        __m512 ds = _mm512_mul_ps(e, _mm512_fmadd_ps(shift, share[v], row_share));
        ds = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(ds), least, _CMP_NLT_UQ), ds);
        ds = _mm512_sub_ps(ds, _mm512_add_ps(row_even, even[v]));
        ds = _mm512_mul_ps(ds, both);
        _mm512_mask_storeu_ps(out + i * stride + j + 16 * v, part.of[v], ds);
      }
    }
  }
}

template <class E>
FASTXM_AVX512_BF16 void exponentials_avx512(const Tile<float>& t,
                                            const References<float>& references, E* keep) {
  for (std::int64_t j = 0; j < t.width; j += kPanel) {
    const Lanes part(t.width - j);
    for (std::int64_t i = 0; i < t.rows; ++i) {
      const __m512 own = _mm512_set1_ps(references.own[i]);
      const __m512 shift = _mm512_set1_ps(references.shift[i]);
#pragma GCC unroll 4
      for (int v = 0; v < Lanes::count; ++v) {
        const __m512 s = _mm512_maskz_loadu_ps(part.of[v], t.s + i * kStrip + j + 16 * v);
        const __m512 e = probability(_mm512_sub_ps(s, own), part.of[v]);
        store_rounded(keep + j * kTile<E> + i * kPanel + 16 * v, _mm512_mul_ps(e, shift),
                      part.of[v]);
      }
    }
  }
}

template <class E>
FASTXM_AVX512_BF16 void rows_avx512(const float* tile, std::int64_t rows, std::int64_t width, E* to,
                                    std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; j += 16) {
      const Lanes part(width - j);
      const __m512 x = _mm512_maskz_loadu_ps(part.of[0], tile + i * kStrip + j);
      store_rounded(to + i * stride + j, x, part.of[0]);
    }
}

FASTXM_AVX512_BF16 void steps_avx512(const float* tile, std::int64_t rows, std::int64_t width,
                                     bfloat16* panels, std::int64_t panel) {
  const __m512i beside = evens_and_odds();
  for (std::int64_t j = 0; j < width; j += kPanel, panels += panel) {
    const Lanes part(width - j);
    for (std::int64_t i = 0; i < rows; i += 2) {
      const bool two = i + 1 < rows;
#pragma GCC unroll 4
      for (int v = 0; v < Lanes::count; ++v) {
        const float* from = tile + i * kStrip + j + 16 * v;
        const __m512 low = _mm512_maskz_loadu_ps(part.of[v], from);
        const __m512 high = _mm512_maskz_loadu_ps(two ? part.of[v] : __mmask16{0}, from + kStrip);
        const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(panels + i * kPanel + 32 * v, _mm512_permutexvar_epi16(beside, both));
      }
    }
  }
}

#endif

template <class T>
FASTXM_INLINE void scale_tile(const Tile<T>& t, T* row_top, T* column_top) {
#ifdef FASTXM_VECTORS
  if constexpr (std::is_same_v<T, float>)
    if (has_avx512() && !t.column_labels) return scale_tile_avx512(t, row_top, column_top);
#endif
  scale_tile_of(t, row_top, column_top);
}

template <class T, class E>
FASTXM_INLINE void shared_sums(const Tile<T>& t, const References<T>& references, T* row,
                               std::int64_t row_stride, ColumnSums<T>& columns, E* keep) {
#ifdef FASTXM_VECTORS
  if constexpr (std::is_same_v<T, float>)
    if (has_avx512()) return shared_sums_avx512(t, references, row, row_stride, columns, keep);
#endif
  shared_sums_of(t, references, row, row_stride, columns, keep);
}

template <class T, class E>
FASTXM_INLINE void shared_gradient(const Tile<T>& t, const T* references, const Shares<T>& shares,
                                   const E* kept, T* out, std::int64_t stride) {
#ifdef FASTXM_VECTORS
  if constexpr (std::is_same_v<T, float>)
    if (has_avx512()) return shared_gradient_avx512(t, references, shares, kept, out, stride);
#endif
  shared_gradient_of(t, references, shares, kept, out, stride);
}

template <class T, class E>
FASTXM_INLINE void exponentials(const Tile<T>& t, const References<T>& references, E* keep) {
#ifdef FASTXM_VECTORS
  if constexpr (std::is_same_v<T, float>)
    if (has_avx512()) return exponentials_avx512(t, references, keep);
#endif
  exponentials_of(t, references, keep);
}

template <class E>
FASTXM_INLINE void rows_to(const float* tile, std::int64_t rows, std::int64_t width, E* to,
                           std::int64_t stride) {
#ifdef FASTXM_VECTORS
  if (has_avx512()) return rows_avx512(tile, rows, width, to, stride);
#endif
  rows_to_of(tile, rows, width, to, stride);
}

FASTXM_INLINE void steps_to(const float* tile, std::int64_t rows, std::int64_t width, float* panels,
                            std::int64_t panel) {
  steps_to_of(tile, rows, width, panels, panel);
}
FASTXM_INLINE void steps_to(const float* tile, std::int64_t rows, std::int64_t width,
                            bfloat16* panels, std::int64_t panel) {
#ifdef FASTXM_VECTORS
  if (has_avx512()) return steps_avx512(tile, rows, width, panels, panel);
#endif
  steps_to_of(tile, rows, width, panels, panel);
}

}  // namespace
}  // namespace fastxm
