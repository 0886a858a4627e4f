// Tiles of AMX: pairs of bfloat16 with float32 accumulators, 32 rows and 32 columns at a time.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/lines.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

#ifndef FASTXM_AMX  // tests emulate it
#define FASTXM_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

constexpr std::int64_t kSide = 16;    // rows of a tile, and words of 4 bytes in each
constexpr std::int64_t kDepth = 256;  // steps at a time: what 32 columns have of them is 32 KB

// all that was written is in memory, at p too: compilers do not know what the instructions read
inline void settle(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Which tiles there are, as `ldtilecfg` reads it. Sums are tiles 0 to 3, [row half][column half];
// rows are tiles 4 and 5, columns 6 and 7. A half that is empty has no tiles.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  TileShapes() = default;
  TileShapes(std::int64_t height, std::int64_t width, std::int64_t steps) {
    auto half = [](std::int64_t n, int i) { return std::clamp<std::int64_t>(n - 16 * i, 0, 16); };
    auto set = [&](int tile, std::int64_t r, std::int64_t words) {
      rows[tile] = static_cast<std::uint8_t>(words ? r : 0);
      bytes[tile] = static_cast<std::uint16_t>(r ? 4 * words : 0);
    };
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) set(2 * i + j, half(height, i), half(width, j));
      set(4 + i, half(height, i), steps);
      set(6 + i, steps, half(width, i));
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

// out = rows of a, `a_row` bytes apart, times columns of a panel, or that is added to it; Rows and
// Columns halves of them
template <int Rows, int Columns>
FASTXM_AMX void amx_tile(const char* a, std::int64_t a_row, const char* panel, std::int64_t steps,
                         float* out, std::int64_t out_stride, bool add) {
  const std::int64_t stride = 4 * out_stride, across = 4 * kPanel;
  float* below = out + kSide * out_stride;
  settle(out);
  if (add) {
    _tile_loadd(0, out, stride);
    if constexpr (Columns > 1) _tile_loadd(1, out + kSide, stride);
    if constexpr (Rows > 1) _tile_loadd(2, below, stride);
    if constexpr (Rows > 1 && Columns > 1) _tile_loadd(3, below + kSide, stride);
  } else {
    _tile_zero(0);
    if constexpr (Columns > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Columns > 1) _tile_zero(3);
  }
  for (std::int64_t k = 0; k < steps; k += kSide, a += 4 * kSide, panel += kSide * across) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, panel, across);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, panel + 4 * kSide, across);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, a + kSide * a_row, a_row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (Rows > 1 && Columns > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, stride);
  if constexpr (Columns > 1) _tile_stored(1, out + kSide, stride);
  if constexpr (Rows > 1) _tile_stored(2, below, stride);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, below + kSide, stride);
  settle(out);
}

// Products of 32 rows and 32 columns, or of what there is of them; tiles are shaped anew where that
// or the steps of one tile are not as before.
struct Shaped {
  std::int64_t height = 0, width = 0, side = 0;

  FASTXM_AMX void operator()(const Left& a, const char* panel, std::int64_t steps,
                             std::int64_t rows, std::int64_t columns, float* out,
                             std::int64_t out_stride, bool add) {
    const std::int64_t most = std::min(kSide, steps);
    if (rows != height || columns != width || most != side) {
      height = rows, width = columns, side = most;
      const TileShapes shapes(height, width, side);
      settle(&shapes);
      _tile_loadconfig(&shapes);
    }
    auto* run = rows <= kSide ? (columns <= kSide ? amx_tile<1, 1> : amx_tile<1, 2>)
                              : (columns <= kSide ? amx_tile<2, 1> : amx_tile<2, 2>);
    run(static_cast<const char*>(a.data), a.row, panel, steps, out, out_stride, add);
  }
};

// as `multiply`, of bfloat16; rows whose steps do not stand side by side do so themselves
FASTXM_AMX void multiply_amx(const Panels& panels, const Left& left, std::int64_t rows,
                             std::int64_t first, std::int64_t columns, float* out,
                             std::int64_t out_stride, bool add) {
  constexpr std::int64_t across = 4 * kPanel, most = 2 * kSide;
  const std::int64_t steps = panels.depth / 2, apart = panels.apart() / 2;
  Shaped tile;
  for (std::int64_t k = 0, count; k == 0 || k < steps; k += count, add = true) {
    count = std::min(kDepth, steps - k);
    if (count > kSide) count -= count % kSide;  // a last tile of fewer steps has another shape
    auto panel = [&](std::int64_t j) {
      return pointer<const char>(panels.data) + j / kPanel * apart * across + j % kPanel * 4 +
             k * across;
    };
    const char* data = static_cast<const char*>(left.data) + k * left.step;
    if (left.step == 4) {
      for (std::int64_t j = 0; j < columns; j += most)
        for (std::int64_t i = 0; i < rows; i += most)
          tile({data + i * left.row, left.row, 4}, panel(first + j), count,
               std::min(most, rows - i), std::min(most, columns - j), out + i * out_stride + j,
               out_stride, add);
    } else {
      alignas(64) std::uint32_t room[most * kDepth];
      for (std::int64_t i = 0; i < rows; i += most) {
        const std::int64_t height = std::min(most, rows - i);
        transpose(data + i * left.row, left.step / 4, count, height, room, count);
        for (std::int64_t j = 0; j < columns; j += most)
          tile({room, 4 * count, 4}, panel(first + j), count, height, std::min(most, columns - j),
               out + i * out_stride + j, out_stride, add);
      }
    }
    if (!count) break;
  }
  _tile_release();
}

// whether the processor has such tiles, and the system lets this process use them
bool find_amx() {
  unsigned a, b, c, d = 0;
  constexpr unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// whether they multiply 20 x 18 pairs x 40 as plain sums do, which are exact of small integers
bool amx_is_right() {
  constexpr std::int64_t rows = 20, depth = 36, columns = 40;
  auto value = [](std::int64_t i) { return static_cast<float>(i * 7 % 5 - 2); };
  Lines<bfloat16> a(rows * depth), panel(kPanel * depth);
  std::fill_n(panel.data(), kPanel * depth, bfloat16{0});
  for (std::int64_t i = 0; i < rows * depth; ++i) from_float(value(i), a.data()[i]);
  for (std::int64_t k = 0; k < depth; ++k)
    for (std::int64_t j = 0; j < columns; ++j)
      from_float(value(k + 3 * j), panel.data()[(k / 2 * kPanel + j) * 2 + k % 2]);
  Lines<float> out(rows * columns);
  const Panels panels = {true, depth, reinterpret_cast<std::uintptr_t>(panel.data())};
  multiply_amx(panels, {a.data(), 2 * depth, 4}, rows, 0, columns, out.data(), columns, false);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (std::int64_t k = 0; k < depth; ++k) sum += value(i * depth + k) * value(k + 3 * j);
      if (out.data()[i * columns + j] != sum) return false;
    }
  return true;
}

}  // namespace
}  // namespace fastxm
