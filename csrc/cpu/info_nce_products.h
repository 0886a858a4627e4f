// InfoNCE's gradients as products of a block's logit gradients, by the tile kernels of gemm.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/info_nce_tile.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

// a tile of rows `stride` apart, into `to`, and its transpose into `turned`, of bfloat16 with a row
// of 0 after an odd number of them
FASTXM_INLINE void spread_tile_of(const float* tile, std::int64_t stride, std::int64_t rows,
                                  std::int64_t width, float* to, std::int64_t to_stride,
                                  float* turned, std::int64_t turned_stride) {
  for (std::int64_t i = 0; i < rows; ++i)
    std::memcpy(to + i * to_stride, tile + i * stride, sizeof(float) * width);
  transpose(tile, stride, rows, width, turned, turned_stride);
}

FASTXM_INLINE void spread_tile_of(const float* tile, std::int64_t stride, std::int64_t rows,
                                  std::int64_t width, bfloat16* to, std::int64_t to_stride,
                                  bfloat16* turned, std::int64_t turned_stride) {
  std::uint32_t pairs[kTile / 2 * kStrip];  // of two rows
  for (std::int64_t i = 0; i < rows; i += 2) {
    for (std::int64_t k = i; k < std::min(rows, i + 2); ++k)
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j)
        from_float(tile[k * stride + j], to[k * to_stride + j]);
    const bfloat16 *low = to + i * to_stride, *high = i + 1 < rows ? low + to_stride : nullptr;
    std::uint32_t* pair = pairs + i / 2 * kStrip;
    for (std::int64_t j = 0; j < width; ++j)
      pair[j] = high ? low[j].bits | std::uint32_t{high[j].bits} << 16 : low[j].bits;
  }
  transpose(pairs, kStrip, (rows + 1) / 2, width, turned, turned_stride / 2);
}

FASTXM_MULTIARCH void round_rows(const float* from, std::int64_t stride, std::int64_t rows,
                                 std::int64_t width, bfloat16* to, std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j)
      from_float(from[i * stride + j], to[i * to_stride + j]);
}

// out [rows, columns] = a [rows, depth] times packed columns, or, of float32, that is added to it
template <class E, class Out>
void times(const E* a, std::int64_t a_stride, std::int64_t rows, const Panels& panels,
           std::int64_t columns, Out* out, bool add, int threads) {
  auto part = [&](std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t width) {
    const E* from = a + i * a_stride;
    Out* to = out + i * columns + j;
    if constexpr (sizeof(Out) == 4) {
      multiply(panels, from, a_stride, n, j, width, to, columns, add);
    } else {
      alignas(64) float product[kPart * kPanel];
      multiply(panels, from, a_stride, n, j, width, product, kPanel);
      round_rows(product, kPanel, n, width, to, columns);
    }
  };
  for_each_part(rows, columns, threads, part);
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
  for (std::int64_t i = 0; i < rows; i += kTile)
    inner_rows(x + i * depth, dx + i * depth, std::min(kTile, rows - i), depth, factor + i,
               out + i);
}

}  // namespace
}  // namespace fastxm
