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
  for (; rows >= kTileRows;
       rows -= kTileRows, a += kTileRows * a_row, out += kTileRows * out_stride)
    tile<Element, kTileRows>(a, a_row, a_step, panel, steps, out, out_stride, width, add);
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

namespace {

#define FASTXM_AVX512 __attribute__((target("arch=x86-64-v4")))

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

FASTXM_AVX512 FASTXM_INLINE __mmask16 first_of(std::int64_t n) {
  return static_cast<__mmask16>((1u << std::min<std::int64_t>(16, n)) - 1);
}

// one panel of rows of y; of bfloat16 those of a pair stand beside each other
FASTXM_AVX512 void pack_panel(const std::uint32_t* y, std::int64_t rows, std::int64_t width,
                              std::int64_t stride, std::uint32_t* to) {
  for (std::int64_t k = 0; k < rows; ++k, y += stride, to += kPanel) {
    for (std::int64_t i = 0; i < width; ++i) to[i] = y[i];
    for (std::int64_t i = width; i < kPanel; ++i) to[i] = 0;
  }
}

FASTXM_AVX512 void pack_panel(const std::uint16_t* y, std::int64_t rows, std::int64_t width,
                              std::int64_t stride, std::uint32_t* to) {
  for (std::int64_t k = 0; k < rows; k += 2, y += 2 * stride, to += kPanel) {
    if (k + 1 < rows)
      for (std::int64_t i = 0; i < width; ++i) to[i] = y[i] | std::uint32_t{y[stride + i]} << 16;
    else
      for (std::int64_t i = 0; i < width; ++i) to[i] = y[i];
    for (std::int64_t i = width; i < kPanel; ++i) to[i] = 0;
  }
}

}  // namespace

FASTXM_AVX512 void transpose(const void* from, std::int64_t stride, std::int64_t rows,
                             std::int64_t columns, void* to, std::int64_t to_stride) {
  const auto* source = static_cast<const std::uint32_t*>(from);
  for (std::int64_t j = 0; j < columns; j += 16)
    for (std::int64_t i = 0; i < rows; i += 16) {
      const __mmask16 width = first_of(columns - j), height = first_of(rows - i);
      __m512i block[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        block[k] = i + k < rows ? _mm512_maskz_loadu_epi32(width, source + (i + k) * stride + j)
                                : _mm512_setzero_si512();
      transpose_block(block);
      auto* at = static_cast<std::uint32_t*>(to) + j * to_stride + i;
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        if (j + k < columns) _mm512_mask_storeu_epi32(at + k * to_stride, height, block[k]);
    }
}

void pack_rows(const Panels& panels, const void* y, std::int64_t rows, std::int64_t columns,
               std::int64_t stride, std::int64_t first, int threads) {
  const std::int64_t words = panels.bf16 ? 2 : 1;  // of bfloat16 two elements make one
#pragma omp parallel for num_threads(threads)
  for (std::int64_t j = 0; j < columns; j += kPanel) {
    auto* to = pointer<std::uint32_t>(panels.data) + (j * panels.depth + first * kPanel) / words;
    const std::int64_t width = std::min(kPanel, columns - j);
    if (panels.bf16)
      pack_panel(static_cast<const std::uint16_t*>(y) + j, rows, width, stride, to);
    else
      pack_panel(static_cast<const std::uint32_t*>(y) + j, rows, width, stride, to);
  }
}

void pack_columns(const Panels& panels, const void* y, std::int64_t columns, std::int64_t stride,
                  int threads) {
  const std::int64_t words = panels.bf16 ? 2 : 1, steps = panels.depth / words;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t j = 0; j < columns; j += kPanel) {
    const std::int64_t width = std::min(kPanel, columns - j);
    auto* to = pointer<std::uint32_t>(panels.data) + j * steps;
    if (width < kPanel) std::fill_n(to, kPanel * steps, 0u);
    transpose(static_cast<const std::uint32_t*>(y) + j * stride / words, stride / words, width,
              steps, to, kPanel);
  }
}

#else

const char* gemm_level() { return ""; }

void multiply(const Panels&, const Left&, std::int64_t, std::int64_t, std::int64_t, float*,
              std::int64_t, bool) {}

void transpose(const void*, std::int64_t, std::int64_t, std::int64_t, void*, std::int64_t) {}

void pack_rows(const Panels&, const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
               int) {}

void pack_columns(const Panels&, const void*, std::int64_t, std::int64_t, int) {}

#endif

void multiply(const Panels& panels, const void* a, std::int64_t a_stride, std::int64_t rows,
              std::int64_t first, std::int64_t columns, float* out, std::int64_t out_stride,
              bool add) {
  multiply(panels, Left{a, a_stride * (panels.bf16 ? 2 : 4), 4}, rows, first, columns, out,
           out_stride, add);
}

void gemm_pack_cpu(bool bf16, std::uintptr_t y, std::int64_t columns, std::int64_t depth,
                   std::int64_t stride, std::uintptr_t panels, int threads) {
  pack_columns({bf16, depth, panels}, pointer<const void>(y), columns, stride, threads);
}

void gemm_pack_rows_cpu(bool bf16, std::uintptr_t y, std::int64_t rows, std::int64_t columns,
                        std::int64_t stride, std::uintptr_t panels, int threads) {
  const Panels packed = {bf16, round_up(rows, bf16 ? 2 : 1), panels};
  pack_rows(packed, pointer<const void>(y), rows, columns, stride, 0, threads);
}

void gemm_cpu(bool bf16, std::uintptr_t a, std::int64_t a_stride, std::int64_t rows,
              std::uintptr_t panels, std::int64_t depth, std::int64_t columns, std::uintptr_t out,
              std::int64_t out_stride, int threads) {
  const Panels packed = {bf16, depth, panels};
  auto part = [&](std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t width) {
    multiply(packed, pointer<const char>(a) + i * a_stride * (bf16 ? 2 : 4), a_stride, n, j, width,
             pointer<float>(out) + i * out_stride + j, out_stride);
  };
  for_each_part(rows, columns, threads, part);
}

}  // namespace fastxm
