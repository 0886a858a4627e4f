// What InfoNCE's gradients are products of: tiles, rows and transposes as gemm.h takes them.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/info_nce_rows.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

// rows of a tile [rows, kStrip], `stride` apart
template <class E>
FASTXM_INLINE void rows_to_of(const float* tile, std::int64_t rows, std::int64_t width, E* to,
                              std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) from_float(tile[i * kStrip + j], to[i * stride + j]);
}

// the same as steps of panels that lie `panel` elements apart; of bfloat16 two rows make one, an
// odd last one and 0
FASTXM_INLINE void steps_to_of(const float* tile, std::int64_t rows, std::int64_t width,
                               float* panels, std::int64_t panel) {
  for (std::int64_t j = 0; j < width; j += kPanel, panels += panel)
    for (std::int64_t i = 0; i < rows; ++i)
      std::memcpy(panels + i * kPanel, tile + i * kStrip + j,
                  sizeof(float) * std::min(kPanel, width - j));
}
FASTXM_INLINE void steps_to_of(const float* tile, std::int64_t rows, std::int64_t width,
                               bfloat16* panels, std::int64_t panel) {
  for (std::int64_t i = 0; i < rows; i += 2)
    for (std::int64_t j = 0; j < width; ++j) {
      bfloat16* pair = panels + j / kPanel * panel + i * kPanel + j % kPanel * 2;
      from_float(tile[i * kStrip + j], pair[0]);
      from_float(i + 1 < rows ? tile[(i + 1) * kStrip + j] : 0.0f, pair[1]);
    }
}

FASTXM_MULTIARCH void round_rows(const float* from, std::int64_t stride, std::int64_t rows,
                                 std::int64_t width, bfloat16* to, std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j)
      from_float(from[i * stride + j], to[i * to_stride + j]);
}

// out[i] = <x[i], dx[i]> / factor[i]
template <class E, class Out>
FASTXM_INLINE void inner_of(const E* x, const Out* dx, std::int64_t rows, std::int64_t depth,
                            const float* factor, float* out) {
  for (std::int64_t i = 0; i < rows; ++i) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < depth; ++k)
      sum += to_float(x[i * depth + k]) * to_float(dx[i * depth + k]);
    out[i] = sum / factor[i];
  }
}
#define FASTXM_INSTANCES(E, Out)                                                          \
  FASTXM_MULTIARCH void inner_rows(const E* x, const Out* dx, std::int64_t rows,          \
                                   std::int64_t depth, const float* factor, float* out) { \
    inner_of(x, dx, rows, depth, factor, out);                                            \
  }
FASTXM_INSTANCES(float, float)
FASTXM_INSTANCES(bfloat16, float)
FASTXM_INSTANCES(bfloat16, bfloat16)
#undef FASTXM_INSTANCES

template <class E, class Out>
void inner(const E* x, const Out* dx, std::int64_t rows, std::int64_t depth, const float* factor,
           float* out, int threads) {
#pragma omp parallel for num_threads(threads)
  for (std::int64_t i = 0; i < rows; i += kTallest)
    inner_rows(x + i * depth, dx + i * depth, std::min(kTallest, rows - i), depth, factor + i,
               out + i);
}

}  // namespace
}  // namespace fastxm
