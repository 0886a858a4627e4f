// InfoNCE's gradients as products of a block's logit gradients, by the tile kernels of gemm.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

// uninitialised memory that begins with a cache line
template <class T>
class Lines {
 public:
  explicit Lines(std::int64_t n = 0) : lines_(n ? new Line[(n * sizeof(T) + 63) / 64] : nullptr) {}
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

FASTXM_INLINE std::int64_t round_up(std::int64_t n, std::int64_t to) {
  return (n + to - 1) / to * to;
}

// rows x [rows, depth] as panels of 64 of their columns: [depth / 64 rounded up, rows, 64]; of
// bfloat16 [depth / 64 rounded up, rows / 2 rounded up, 64, 2], what is missing being 0
inline void pack_panel(const float* x, std::int64_t rows, std::int64_t depth, std::int64_t width,
                       float* panel) {
  for (std::int64_t i = 0; i < rows; ++i, x += depth, panel += kPanel) {
    std::copy(x, x + width, panel);
    std::fill(panel + width, panel + kPanel, 0.0f);
  }
}

FASTXM_INLINE std::uint32_t pair_of(bfloat16 low, bfloat16 high) {
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}

inline void pack_panel(const bfloat16* x, std::int64_t rows, std::int64_t depth, std::int64_t width,
                       bfloat16* panel) {
  auto* pairs = reinterpret_cast<std::uint32_t*>(panel);
  for (std::int64_t i = 0; i < rows; i += 2, x += 2 * depth, pairs += kPanel) {
    std::fill(pairs + width, pairs + kPanel, 0u);
    if (i + 1 < rows)
      for (std::int64_t k = 0; k < width; ++k) pairs[k] = pair_of(x[k], x[depth + k]);
    else
      for (std::int64_t k = 0; k < width; ++k) pairs[k] = x[k].bits;
  }
}

template <class E>
void pack_rows(const E* x, std::int64_t rows, std::int64_t depth, E* panels, int threads) {
  std::int64_t height = sizeof(E) == 2 ? round_up(rows, 2) : rows;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t first = 0; first < depth; first += kPanel)
    pack_panel(x + first, rows, depth, std::min(kPanel, depth - first), panels + first * height);
}

// y [rows, depth] as panels of its transpose, as gemm_pack_cpu does, a cache line of y at a time.
// T: an element, or a pair of bfloat16
template <class T>
void pack_columns(const T* y, std::int64_t rows, std::int64_t steps, T* panels, int threads) {
  constexpr std::int64_t kLine = 16;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t first = 0; first < rows; first += kPanel) {
    std::int64_t width = std::min(kPanel, rows - first);
    const T* from = y + first * steps;
    T* to = panels + first * steps;
    for (std::int64_t k = 0; k < steps; k += kLine) {
      std::int64_t line = std::min(kLine, steps - k);
      for (std::int64_t j = 0; j < kPanel; ++j)
        for (std::int64_t l = 0; l < line; ++l)
          to[(k + l) * kPanel + j] = j < width ? from[j * steps + k + l] : T(0);
    }
  }
}

constexpr std::int64_t kMostColumns = 256;

// a tile [rows, stride], of kMostColumns at most, into `to`, and its transpose into `turned`, of
// bfloat16 with a row of 0 after an odd number of them
FASTXM_INLINE void spread_tile_of(const float* tile, std::int64_t stride, std::int64_t rows,
                                  std::int64_t width, float* to, std::int64_t to_stride,
                                  float* turned, std::int64_t turned_stride) {
  for (std::int64_t i = 0; i < rows; ++i)
    std::memcpy(to + i * to_stride, tile + i * stride, sizeof(float) * width);
  for (std::int64_t j = 0; j < width; ++j)
    for (std::int64_t i = 0; i < rows; ++i) turned[j * turned_stride + i] = tile[i * stride + j];
}

FASTXM_INLINE void spread_tile_of(const float* tile, std::int64_t stride, std::int64_t rows,
                                  std::int64_t width, bfloat16* to, std::int64_t to_stride,
                                  bfloat16* turned, std::int64_t turned_stride) {
  std::uint32_t pairs[kMostColumns];  // of two rows
  for (std::int64_t i = 0; i < rows; i += 2) {
    for (std::int64_t k = i; k < std::min(rows, i + 2); ++k)
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j)
        from_float(tile[k * stride + j], to[k * to_stride + j]);
    const bfloat16 *low = to + i * to_stride, *high = i + 1 < rows ? low + to_stride : nullptr;
    for (std::int64_t j = 0; j < width; ++j)
      pairs[j] = high ? pair_of(low[j], high[j]) : low[j].bits;
    for (std::int64_t j = 0; j < width; ++j)
      std::memcpy(turned + j * turned_stride + i, pairs + j, 4);
  }
}

// some rows of a product into out, or added to it
template <class Out>
FASTXM_INLINE void emit(const float* product, std::int64_t rows, std::int64_t width, Out* out,
                        std::int64_t out_stride, bool add) {
  for (std::int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) {
      float sum = product[i * kPanel + j];
      if (add) sum += to_float(out[i * out_stride + j]);
      from_float(sum, out[i * out_stride + j]);
    }
}
FASTXM_MULTIARCH void emit_panel(const float* product, std::int64_t rows, std::int64_t width,
                                 float* out, std::int64_t out_stride, bool add) {
  emit(product, rows, width, out, out_stride, add);
}
FASTXM_MULTIARCH void emit_panel(const float* product, std::int64_t rows, std::int64_t width,
                                 bfloat16* out, std::int64_t out_stride, bool add) {
  emit(product, rows, width, out, out_stride, add);
}

// out [rows, columns] = or += a [rows, steps] times packed rows
template <class E, class Out>
void times(const E* a, std::int64_t a_stride, std::int64_t rows, const Panels& panels,
           std::int64_t columns, Out* out, bool add, int threads) {
  constexpr std::int64_t kRows = 240;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (std::int64_t i = 0; i < rows; i += kRows)
    for (std::int64_t j = 0; j < columns; j += kPanel) {
      std::int64_t n = std::min(kRows, rows - i), width = std::min(kPanel, columns - j);
      const E* from = a + i * a_stride;
      Out* to = out + i * columns + j;
      if constexpr (sizeof(Out) == 4) {
        if (!add) {
          multiply(panels, from, a_stride, n, j, width, to, columns);
          continue;
        }
      }
      alignas(64) float product[kRows * kPanel];
      multiply(panels, from, a_stride, n, j, width, product, kPanel);
      emit_panel(product, n, width, to, columns, add);
    }
}

// out[i] = <x[i], dx[i]> / factor[i] of rows from `first`
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
#define FASTXM_INSTANCES(E, Out)                                                                \
  FASTXM_MULTIARCH void inner(const E* x, const Out* dx, std::int64_t rows, std::int64_t depth, \
                              const float* factor, float* out) {                                \
    inner_of(x, dx, rows, depth, factor, out);                                                  \
  }
FASTXM_INSTANCES(float, float)
FASTXM_INSTANCES(bfloat16, float)
FASTXM_INSTANCES(bfloat16, bfloat16)
#undef FASTXM_INSTANCES

}  // namespace
}  // namespace fastxm
