// Rows times packed columns with float32 accumulators in registers, a tile at a time: what stands
// behind it can be done while the tile is in the first cache level.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lines.h"

namespace fastxm {

constexpr std::int64_t kPanel = 64;  // columns of a panel

// elements of one step of a product's depth: of bfloat16 they are multiplied in pairs
template <class E>
constexpr std::int64_t kStep = sizeof(E) == 2 ? 2 : 1;

// the widest products that this machine has: "bfloat16" (and float32), "float32", or "" (neither).
// Nothing below but the panels' size is there without one.
const char* gemm_level();

// whether bfloat16 is multiplied by tiles of AMX, and not by AVX-512
bool gemm_amx();

// a matrix [depth, columns] as panels of 64 columns: [columns / 64 rounded up, depth, 64], of
// bfloat16 [columns / 64 rounded up, depth / 2, 64, 2]; depth is even then. What is missing is 0.
struct Panels {
  bool bf16;
  std::int64_t depth;
  std::uintptr_t data;
  std::int64_t whole = 0;  // depth from panel to panel, where this is a part of it

  std::int64_t apart() const { return whole ? whole : depth; }
};

inline std::int64_t panels_size(std::int64_t columns, std::int64_t depth) {
  return round_up(columns, kPanel) * depth;
}

template <class E>
Panels panels_of(const E* data, std::int64_t depth, std::int64_t whole = 0) {
  return {sizeof(E) == 2, depth, reinterpret_cast<std::uintptr_t>(data), whole};
}

// y [rows, columns], of rows `stride` apart, as the panels' depth from row `first` on; of bfloat16
// `first` is even, and an odd last row is followed by one of 0
void pack_rows(const Panels& panels, const void* y, std::int64_t rows, std::int64_t columns,
               std::int64_t stride, std::int64_t first, int threads);

// y [columns, depth], of rows `stride` apart, as the panels' columns
void pack_columns(const Panels& panels, const void* y, std::int64_t columns, std::int64_t stride,
                  int threads);

void gemm_pack_cpu(bool bf16, std::uintptr_t y, std::int64_t columns, std::int64_t depth,
                   std::int64_t stride, std::uintptr_t panels, int threads);

// of y [rows, columns] as the whole depth, of bfloat16 an even one
void gemm_pack_rows_cpu(bool bf16, std::uintptr_t y, std::int64_t rows, std::int64_t columns,
                        std::int64_t stride, std::uintptr_t panels, int threads);

// to [columns, to_stride] = the transpose of from [rows, stride], of floats or pairs of bfloat16
void transpose(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               void* to, std::int64_t to_stride);

// to [columns, to_stride] = the transpose of from [rows, columns], whose rows stand `stride` apart;
// of bfloat16 with a 0 after an odd last row
template <class E>
void turn(const E* from, std::int64_t rows, std::int64_t columns, std::int64_t stride, E* to,
          std::int64_t to_stride) {
  if constexpr (sizeof(E) == 4) {
    transpose(from, stride, rows, columns, to, to_stride);
    return;
  }
  constexpr std::int64_t some = 64;  // whose pairs stay in the first cache level
  alignas(64) E pairs[some * kPanel];
  for (std::int64_t i = 0; i < rows; i += some)
    for (std::int64_t j = 0; j < columns; j += kPanel) {
      const std::int64_t n = std::min(some, rows - i), width = std::min(kPanel, columns - j);
      const Panels block = panels_of(pairs, round_up(n, 2));
      pack_rows(block, from + i * stride + j, n, width, stride, 0, 1);
      transpose(pairs, kPanel, block.depth / 2, width, to + j * to_stride + i, to_stride / 2);
    }
}

// a matrix whose step k of row i, a float or a pair of bfloat16, is `i row + k step` bytes from its
// data; row or step is 4
struct Left {
  const void* data;
  std::int64_t row, step;
};

// one panel's columns, from `first` on, as rows
template <class E>
Left columns_of(const Panels& panels, std::int64_t first) {
  return {reinterpret_cast<const E*>(panels.data) + first * panels.apart(), 4, 4 * kPanel};
}

// out [rows, columns] = a [rows, depth] times the packed columns from `first`, a multiple of 64; or
// that is added to it
void multiply(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
              std::int64_t columns, float* out, std::int64_t out_stride, bool add = false);

// the same of a whose rows stand a_stride elements apart
void multiply(const Panels& panels, const void* a, std::int64_t a_stride, std::int64_t rows,
              std::int64_t first, std::int64_t columns, float* out, std::int64_t out_stride,
              bool add = false);

constexpr int kTileRows = 6;             // of a register tile
constexpr std::int64_t kMostRows = 240;  // of a part, by register tiles
constexpr std::int64_t kWidest = 512;    // columns of a part, by tiles of AMX

// Most rows and columns of a part of a product: as many parts as keep every thread at work, of
// about one height, and columns in whole panels.
struct PartSize {
  std::int64_t rows, columns;
};
PartSize part_of(std::int64_t rows, std::int64_t columns, bool bf16, int threads);

// f(first row, rows, first column, columns) for the parts of a product
template <class F>
void for_each_part(std::int64_t rows, std::int64_t columns, bool bf16, int threads, F f) {
  const PartSize part = part_of(rows, columns, bf16, threads);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (std::int64_t i = 0; i < rows; i += part.rows)
    for (std::int64_t j = 0; j < columns; j += part.columns)
      f(i, std::min(part.rows, rows - i), j, std::min(part.columns, columns - j));
}

void gemm_cpu(bool bf16, std::uintptr_t a, std::int64_t a_stride, std::int64_t rows,
              std::uintptr_t panels, std::int64_t depth, std::int64_t columns, std::uintptr_t out,
              std::int64_t out_stride, int threads);

}  // namespace fastxm
