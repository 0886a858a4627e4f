#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FASTXM_TILES
#include "cpu/gemm_amx.h"
#include "cpu/gemm_avx2.h"
#include "cpu/gemm_avx512.h"
#endif

namespace fastxm {

#ifdef FASTXM_TILES

namespace {

constexpr std::int64_t kLongSum = 128;

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// some rows times a part of a panel, or of rows fewer than a register tile's, R at most, those
template <class Tile, int R = kTileRows>
void times_panel(const char* a, std::int64_t a_row, std::int64_t a_step, std::int64_t rows,
                 const char* panel, std::int64_t steps, float* out, std::int64_t out_stride,
                 std::int64_t width, bool add) {
  for (; rows >= R; rows -= R, a += R * a_row, out += R * out_stride)
    Tile::template tile<R>(a, a_row, a_step, panel, steps, out, out_stride, width, add);
  if constexpr (R > 1)
    if (rows)
      times_panel<Tile, R - 1>(a, a_row, a_step, rows, panel, steps, out, out_stride, width, add);
}

// A product's depth is taken in parts of at most Tile::depth steps, what of a panel stays in a near
// cache, and their sums are added up: of more than kLongSum steps in two parts at least, as long
// sums lose digits.
template <class Tile>
void multiply_as(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
                 std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  const std::int64_t steps = panels.depth / Tile::step;
  const std::int64_t least = steps > kLongSum ? 2 : 1;
  const std::int64_t parts = std::max((steps + Tile::depth - 1) / Tile::depth, least);
  const std::int64_t part = std::max<std::int64_t>(1, (steps + parts - 1) / parts);
  const std::int64_t bytes = panels.apart() / Tile::step * 4 * kPanel;
  const char* panel = pointer<const char>(panels.data) + first / kPanel * bytes;
  const char* row = static_cast<const char*>(a.data);
  for (std::int64_t j = 0; j < columns; j += kPanel, panel += bytes)
    for (std::int64_t k = 0; k == 0 || k < steps; k += part)
      times_panel<Tile>(row + k * a.step, a.row, a.step, rows, panel + 4 * kPanel * k,
                        std::min(part, steps - k), out + j, out_stride,
                        std::min(kPanel, columns - j), add || k > 0);
}

}  // namespace

const char* gemm_level() {
  if (has_avx512_bf16()) return "bfloat16";
  return has_avx2() ? "float32" : "";
}

bool gemm_amx() {
  static const bool has =
      !std::getenv("FASTXM_CPU_LEVEL") && has_avx512_bf16() && find_amx() && amx_is_right();
  return has;
}

void multiply(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
              std::int64_t columns, float* out, std::int64_t out_stride, bool add) {
  auto* run = panels.bf16    ? gemm_amx() ? multiply_amx : multiply_as<Avx512<Pair>>
              : has_avx512() ? multiply_as<Avx512<Float>>
                             : multiply_as<Avx2>;
  run(panels, a, rows, first, columns, out, out_stride, add);
}

void transpose(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               void* to, std::int64_t to_stride) {
  if (has_avx512())
    transpose_avx512(static_cast<const std::uint32_t*>(from), stride, rows, columns,
                     static_cast<std::uint32_t*>(to), to_stride);
  else
    transpose_avx2(static_cast<const float*>(from), stride, rows, columns, static_cast<float*>(to),
                   to_stride);
}

namespace {

// one panel of rows of y; of bfloat16 those of a pair stand beside each other
FASTXM_MULTIARCH void pack_panel(const std::uint32_t* y, std::int64_t rows, std::int64_t width,
                                 std::int64_t stride, std::uint32_t* to) {
  for (std::int64_t k = 0; k < rows; ++k, y += stride, to += kPanel) {
    for (std::int64_t i = 0; i < width; ++i) to[i] = y[i];
    for (std::int64_t i = width; i < kPanel; ++i) to[i] = 0;
  }
}

FASTXM_MULTIARCH void pack_panel(const std::uint16_t* y, std::int64_t rows, std::int64_t width,
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

bool gemm_amx() { return false; }

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

PartSize part_of(std::int64_t rows, std::int64_t columns, bool bf16, int threads) {
  if (!bf16 || !gemm_amx()) {
    const std::int64_t parts = std::max<std::int64_t>(1, round_up(rows, kMostRows) / kMostRows);
    const std::int64_t height = round_up((rows + parts - 1) / parts, kTileRows);
    return {std::max<std::int64_t>(kTileRows, height), kPanel};
  }
  // of a depth of 512 the columns fill half of a second cache level, and the rows a quarter
  PartSize part = {256, 512};
  auto few = [&] {
    return (rows + part.rows - 1) / part.rows * ((columns + part.columns - 1) / part.columns) <
           2 * threads;
  };
  while (part.columns > kPanel && few()) part.columns /= 2;
  while (part.rows > 32 && few()) part.rows /= 2;
  return part;
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
  for_each_part(rows, columns, bf16, threads, part);
}

}  // namespace fastxm
