// Register tiles of AVX-512: float32, and pairs of bfloat16, of 6 rows and 64 columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

constexpr int kVectors = 4;  // vectors of a panel's row

// one step of a register tile: an element, or a pair of bfloat16, of each row
struct Float {
  static constexpr std::int64_t step = 1;  // elements of a step
  FASTXM_AVX512_BF16 static FASTXM_INLINE __m512 add(__m512 sum, std::uint32_t a, __m512i b) {
    __m512 row = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a)));
    return _mm512_fmadd_ps(row, _mm512_castsi512_ps(b), sum);
  }
};

struct Pair {
  static constexpr std::int64_t step = 2;
  FASTXM_AVX512_BF16 static FASTXM_INLINE __m512 add(__m512 sum, std::uint32_t a, __m512i b) {
    auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a));
    return _mm512_dpbf16_ps(sum, row, (__m512bh)b);
  }
};

template <class Element>
struct Avx512 {
  static constexpr std::int64_t step = Element::step;
  static constexpr std::int64_t depth = 256;  // steps at a time: 64 KB of a panel

  // out [R, width <= 64] = a [R, steps] times one panel, or that is added to it
  template <int R>
  FASTXM_AVX512_BF16 static void tile(const char* a, std::int64_t a_row, std::int64_t a_step,
                                      const char* panel, std::int64_t steps, float* out,
                                      std::int64_t out_stride, std::int64_t width, bool add) {
    __m512 sums[R][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < steps; ++k, panel += 64 * kVectors, a += a_step) {
      __m512i columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        std::uint32_t element;
        std::memcpy(&element, a + i * a_row, 4);
        for (int v = 0; v < kVectors; ++v)
          sums[i][v] = Element::add(sums[i][v], element, columns[v]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __mmask16 mask = lanes(width - 16 * v);
        float* at = out + i * out_stride + 16 * v;
        if (add) sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(mask, at));
        _mm512_mask_storeu_ps(at, mask, sums[i][v]);
      }
  }
};

// Four rounds, each of which turns the bits of (row, column) by one: the row's highest becomes the
// column's lowest.
FASTXM_AVX512 FASTXM_INLINE void transpose_block(__m512i (&rows)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int round = 0; round < 4; ++round) {
    __m512i turned[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      turned[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + 8]);
      turned[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + 8]);
    }
    std::copy_n(turned, 16, rows);
  }
}

FASTXM_AVX512 void transpose_avx512(const std::uint32_t* from, std::int64_t stride,
                                    std::int64_t rows, std::int64_t columns, std::uint32_t* to,
                                    std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; i += 16)
    for (std::int64_t j = 0; j < columns; j += 16) {
      const __mmask16 width = lanes(columns - j), height = lanes(rows - i);
      __m512i block[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        block[k] = i + k < rows ? _mm512_maskz_loadu_epi32(width, from + (i + k) * stride + j)
                                : _mm512_setzero_si512();
      transpose_block(block);
      auto* at = to + j * to_stride + i;
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        if (j + k < columns) _mm512_mask_storeu_epi32(at + k * to_stride, height, block[k]);
    }
}

}  // namespace
}  // namespace fastxm
