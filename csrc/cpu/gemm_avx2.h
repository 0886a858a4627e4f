// Register tiles of AVX2: float32, of 6 rows and 16 columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/avx2.h"
#include "cpu/gemm.h"

namespace fastxm {
namespace {

struct Avx2 {
  static constexpr std::int64_t step = 1;     // elements of a step
  static constexpr std::int64_t depth = 128;  // steps whose 32 KB of a panel fill the first cache
  static constexpr std::int64_t columns = 16;

  // out [R, width <= 64] = a [R, steps] times one panel, or that is added to it
  template <int R>
  FASTXM_AVX2 static void tile(const char* a, std::int64_t a_row, std::int64_t a_step,
                               const char* panel, std::int64_t steps, float* out,
                               std::int64_t out_stride, std::int64_t width, bool add) {
    for (std::int64_t j = 0; j < width; j += columns)
      part<R>(a, a_row, a_step, panel + 4 * j, steps, out + j, out_stride, width - j, add);
  }

  template <int R>
  FASTXM_AVX2 static FASTXM_INLINE void part(const char* a, std::int64_t a_row, std::int64_t a_step,
                                             const char* panel, std::int64_t steps, float* out,
                                             std::int64_t out_stride, std::int64_t width,
                                             bool add) {
    __m256 sums[R][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < steps; ++k, panel += 4 * kPanel, a += a_step) {
      const __m256 left = _mm256_loadu_ps(reinterpret_cast<const float*>(panel));
      const __m256 right = _mm256_loadu_ps(reinterpret_cast<const float*>(panel) + 8);
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const __m256 row = _mm256_broadcast_ss(reinterpret_cast<const float*>(a + i * a_row));
        sums[i][0] = _mm256_fmadd_ps(row, left, sums[i][0]);
        sums[i][1] = _mm256_fmadd_ps(row, right, sums[i][1]);
      }
    }
    if (width >= columns) {
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i, out += out_stride)
        for (int v = 0; v < 2; ++v) {
          if (add) sums[i][v] = _mm256_add_ps(sums[i][v], _mm256_loadu_ps(out + 8 * v));
          _mm256_storeu_ps(out + 8 * v, sums[i][v]);
        }
      return;
    }
    const __m256i masks[2] = {first_lanes(width), first_lanes(width - 8)};
    for (int i = 0; i < R; ++i, out += out_stride)
      for (int v = 0; v < 2; ++v) {
        if (add) sums[i][v] = _mm256_add_ps(sums[i][v], _mm256_maskload_ps(out + 8 * v, masks[v]));
        _mm256_maskstore_ps(out + 8 * v, masks[v], sums[i][v]);
      }
  }
};

// block = its transpose
FASTXM_AVX2 FASTXM_INLINE void transpose_block(__m256 (&block)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // of rows i, i + 1: columns 0 1 4 5, then 2 3 6 7
    pairs[i] = _mm256_unpacklo_ps(block[i], block[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(block[i], block[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // of rows i to i + 3: columns k and k + 4 in fours[i + k]
    for (int k = 0; k < 2; ++k) {
      fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
      fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    block[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
    block[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
  }
}

FASTXM_AVX2 void transpose_avx2(const float* from, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, float* to, std::int64_t to_stride) {
  for (std::int64_t j = 0; j < columns; j += 8)
    for (std::int64_t i = 0; i < rows; i += 8) {
      const float* source = from + i * stride + j;
      float* at = to + j * to_stride + i;
      const std::int64_t height = std::min<std::int64_t>(8, rows - i);
      const std::int64_t width = std::min<std::int64_t>(8, columns - j);
      __m256 block[8] = {};
      if (height == 8 && width == 8) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) block[k] = _mm256_loadu_ps(source + k * stride);
        transpose_block(block);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(at + k * to_stride, block[k]);
      } else {
        const __m256i wide = first_lanes(width), high = first_lanes(height);
        for (int k = 0; k < height; ++k) block[k] = _mm256_maskload_ps(source + k * stride, wide);
        transpose_block(block);
        for (int k = 0; k < width; ++k) _mm256_maskstore_ps(at + k * to_stride, high, block[k]);
      }
    }
}

}  // namespace
}  // namespace fastxm
