// What InfoNCE's gradients are products of: tiles, rows and transposes as gemm.h takes them.
#pragma once

#include <algorithm>
#include <cmath>
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

// rnorms[i] = rsqrt(max(sum x[i]^2, 1e-12))
template <class E>
FASTXM_INLINE void rnorms_of(const E* x, std::int64_t rows, std::int64_t depth, float* rnorms) {
  for (std::int64_t i = 0; i < rows; ++i, x += depth) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < depth; ++k) sum += to_float(x[k]) * to_float(x[k]);
    rnorms[i] = 1 / std::sqrt(sum < 1e-12f ? 1e-12f : sum);
  }
}

// What is left to do to finished rows of g y: their inner products with x to along, and the part
// that leads along x is taken off where rows count by their directions.
template <class E>
struct Finish {
  const E* x;           // [rows, depth]
  const float* rnorms;  // [rows], or 0 where lengths count
  float* along;         // [rows], or 0
  std::int64_t depth;
};

constexpr float kLongest = 999999.0f;  // a longer 1 / |x| is of a row that is taken for a longer

template <class E>
FASTXM_INLINE void finish_of(const Finish<E>& f, std::int64_t first, std::int64_t rows, float* dx,
                             std::int64_t stride) {
  if (!f.along && !f.rnorms) return;
  const E* x = f.x + first * f.depth;
  for (std::int64_t i = 0; i < rows; ++i, x += f.depth, dx += stride) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < f.depth; ++k) sum += to_float(x[k]) * dx[k];
    if (f.along) f.along[first + i] = sum;
    if (!f.rnorms || f.rnorms[first + i] > kLongest) continue;
    const float share = sum * f.rnorms[first + i] * f.rnorms[first + i];
#pragma omp simd
    for (std::int64_t k = 0; k < f.depth; ++k) dx[k] -= share * to_float(x[k]);
  }
}

#define FASTXM_INSTANCES(E)                                                                    \
  FASTXM_MULTIARCH void rnorms(const E* x, std::int64_t rows, std::int64_t depth, float* to) { \
    rnorms_of(x, rows, depth, to);                                                             \
  }                                                                                            \
  FASTXM_MULTIARCH void finish_rows(const Finish<E>& f, std::int64_t first, std::int64_t rows, \
                                    float* dx, std::int64_t stride) {                          \
    finish_of(f, first, rows, dx, stride);                                                     \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(bfloat16)
#undef FASTXM_INSTANCES

}  // namespace
}  // namespace fastxm
