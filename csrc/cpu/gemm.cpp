#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>
#define FASTXM_TILES
#endif

namespace fastxm {

#ifdef FASTXM_TILES

namespace {

constexpr int kRows = 6;     // rows of a register tile: 24 accumulators of 16 floats
constexpr int kVectors = 4;  // vectors of a panel's row
// steps that are summed before the sum is added to others: fewer roundings, and 64 KB of a panel
constexpr std::int64_t kDepth = 256;

// no instruction of AVX512-BF16 but the one below comes of it: float32 tiles run on any AVX-512
#define FASTXM_TILE __attribute__((target("arch=x86-64-v4,avx512bf16")))

// one step of a register tile: an element, or a pair of bfloat16, of each row
struct Float {
  static constexpr std::int64_t size = 4;  // bytes of an element
  static constexpr std::int64_t step = 1;  // elements of a step
  FASTXM_TILE static FASTXM_INLINE __m512 add(__m512 sum, std::uint32_t a, __m512i b) {
    __m512 row = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a)));
    return _mm512_fmadd_ps(row, _mm512_castsi512_ps(b), sum);
  }
};

struct Pair {
  static constexpr std::int64_t size = 2;
  static constexpr std::int64_t step = 2;
  FASTXM_TILE static FASTXM_INLINE __m512 add(__m512 sum, std::uint32_t a, __m512i b) {
    auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a));
    return _mm512_dpbf16_ps(sum, row, (__m512bh)b);
  }
};

// out [R, width <= 64] = a [R, steps] times one panel, or that is added to it
template <class Element, int R>
FASTXM_TILE FASTXM_INLINE void tile(const char* a, std::int64_t a_row, std::int64_t a_step,
                                    const char* panel, std::int64_t steps, float* out,
                                    std::int64_t out_stride, std::int64_t width, bool add) {
  __m512 sums[R][kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < steps; ++k, panel += 64 * kVectors, a += a_step) {
    __m512i columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      std::uint32_t element;
      std::memcpy(&element, a + i * a_row, 4);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = Element::add(sums[i][v], element, columns[v]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kVectors; ++v) {
      std::int64_t left = std::min<std::int64_t>(16, std::max<std::int64_t>(0, width - 16 * v));
      auto mask = static_cast<__mmask16>((1u << left) - 1);
      float* at = out + i * out_stride + 16 * v;
      if (add) sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_maskz_loadu_ps(mask, at));
      _mm512_mask_storeu_ps(at, mask, sums[i][v]);
    }
}

template <class Element>
FASTXM_TILE void times_panel(const char* a, std::int64_t a_row, std::int64_t a_step,
                             std::int64_t rows, const char* panel, std::int64_t steps, float* out,
                             std::int64_t out_stride, std::int64_t width, bool add) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, out += kRows * out_stride)
    tile<Element, kRows>(a, a_row, a_step, panel, steps, out, out_stride, width, add);
  for (; rows >= 2; rows -= 2, a += 2 * a_row, out += 2 * out_stride)
    tile<Element, 2>(a, a_row, a_step, panel, steps, out, out_stride, width, add);
  if (rows) tile<Element, 1>(a, a_row, a_step, panel, steps, out, out_stride, width, add);
}

template <class Element>
void multiply_as(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
                 std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  std::int64_t steps = panels.depth / Element::step, bytes = steps * 4 * kPanel;
  const char* panel = pointer<const char>(panels.data) + first / kPanel * bytes;
  const char* row = static_cast<const char*>(a.data);
  for (std::int64_t j = 0; j < columns; j += kPanel, panel += bytes)
    for (std::int64_t k = 0; k == 0 || k < steps; k += kDepth)
      times_panel<Element>(row + k * a.step, a.row, a.step, rows, panel + 4 * kPanel * k,
                           std::min(kDepth, steps - k), out + j, out_stride,
                           std::min(kPanel, columns - j), add || k > 0);
}

}  // namespace

const char* gemm_level() {
  __builtin_cpu_init();
  if (std::strcmp(cpu_level(), "avx512")) return "";
  return __builtin_cpu_supports("avx512bf16") ? "bfloat16" : "float32";
}

void multiply(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
              std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  if (panels.bf16)
    multiply_as<Pair>(panels, a, rows, first, columns, out, out_stride, add);
  else
    multiply_as<Float>(panels, a, rows, first, columns, out, out_stride, add);
}

#else

const char* gemm_level() { return ""; }

void multiply(const Panels&, const Left&, std::int64_t, std::int64_t, std::int64_t, float*,
              std::int64_t, bool) {}

#endif

void multiply(const Panels& panels, const void* a, std::int64_t a_stride, std::int64_t rows,
              std::int64_t first, std::int64_t columns, float* out, std::int64_t out_stride) {
  multiply(panels, {a, a_stride * (panels.bf16 ? 2 : 4), 4}, rows, first, columns, out, out_stride,
           false);
}

namespace {

// T: an element, or a pair of bfloat16
template <class T>
void pack(const T* y, std::int64_t rows, std::int64_t steps, std::int64_t stride, T* panels,
          int threads) {
#pragma omp parallel for num_threads(threads)
  for (std::int64_t first = 0; first < rows; first += kPanel) {
    std::int64_t width = std::min(kPanel, rows - first);
    const T* from = y + first * stride;
    T* to = panels + first * steps;
    for (std::int64_t k = 0; k < steps; ++k, to += kPanel) {
      for (std::int64_t j = 0; j < width; ++j) to[j] = from[j * stride + k];
      for (std::int64_t j = width; j < kPanel; ++j) to[j] = 0;
    }
  }
}

// steps of rows of y become those of panels [.., depth, kPanel]; a step of bfloat16 has two rows
template <class T>
void pack_rows(const T* y, std::int64_t rows, std::int64_t columns, std::int64_t stride, T* panels,
               std::int64_t depth, std::int64_t step) {
  for (std::int64_t j = 0; j < columns; j += kPanel, panels += depth * kPanel) {
    const std::int64_t width = std::min(kPanel, columns - j);
    T* to = panels;
    for (std::int64_t k = 0; k < rows; k += step, to += step * kPanel) {
      const T* from = y + k * stride + j;
      if (width < kPanel || k + step > rows) std::fill_n(to, step * kPanel, T(0));
      if (step == 1)
        std::copy_n(from, width, to);
      else if (k + 1 == rows)
        for (std::int64_t i = 0; i < width; ++i) to[2 * i] = from[i];
      else
        for (std::int64_t i = 0; i < width; ++i)
          to[2 * i] = from[i], to[2 * i + 1] = from[i + stride];
    }
  }
}

}  // namespace

void pack_depth(const Panels& panels, const void* y, std::int64_t rows, std::int64_t columns,
                std::int64_t stride, std::int64_t first) {
  if (panels.bf16)
    pack_rows(static_cast<const std::uint16_t*>(y), rows, columns, stride,
              pointer<std::uint16_t>(panels.data) + first * kPanel, panels.depth, 2);
  else
    pack_rows(static_cast<const std::uint32_t*>(y), rows, columns, stride,
              pointer<std::uint32_t>(panels.data) + first * kPanel, panels.depth, 1);
}

void gemm_pack_cpu(bool bf16, std::uintptr_t y, std::int64_t rows, std::int64_t depth,
                   std::int64_t stride, std::uintptr_t panels, int threads) {
  std::int64_t step = bf16 ? 2 : 1;
  pack(pointer<const std::uint32_t>(y), rows, depth / step, stride / step,
       pointer<std::uint32_t>(panels), threads);
}

void gemm_cpu(bool bf16, std::uintptr_t a, std::int64_t a_stride, std::int64_t rows,
              std::uintptr_t panels, std::int64_t depth, std::int64_t columns, std::uintptr_t out,
              std::int64_t out_stride, int threads) {
  constexpr std::int64_t kStrip = 4 * kPanel, kChunk = 240;
  Panels packed{bf16, depth, panels};
#pragma omp parallel for collapse(2) num_threads(threads)
  for (std::int64_t i = 0; i < rows; i += kChunk)
    for (std::int64_t j = 0; j < columns; j += kStrip)
      multiply(packed, pointer<const char>(a) + i * a_stride * (bf16 ? 2 : 4), a_stride,
               std::min(kChunk, rows - i), j, std::min(kStrip, columns - j),
               pointer<float>(out) + i * out_stride + j, out_stride);
}

}  // namespace fastxm
