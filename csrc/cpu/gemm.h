// Rows times packed columns with float32 accumulators in registers, a tile at a time: what stands
// behind it can be done while the tile is in the first cache level.
#pragma once

#include <cstdint>

namespace fastxm {

constexpr std::int64_t kPanel = 64;  // columns of a panel

// the widest products that this machine has: "bfloat16" (and float32), "float32", or "" (neither)
const char* gemm_level();

// y [M, depth] as panels of 64 columns of its transpose: [M / 64 rounded up, depth, 64], of
// bfloat16 [M / 64 rounded up, depth / 2, 64, 2]; depth is even then. Columns beyond M are 0.
struct Panels {
  bool bf16;
  std::int64_t depth;
  std::uintptr_t data;
};

void gemm_pack_cpu(bool bf16, std::uintptr_t y, std::int64_t rows, std::int64_t depth,
                   std::int64_t stride, std::uintptr_t panels, int threads);

// y [rows, columns] as the panels of its columns, from row `first` of their depth on; of bfloat16
// `first` is even, and an odd last row is followed by one of 0
void pack_depth(const Panels& panels, const void* y, std::int64_t rows, std::int64_t columns,
                std::int64_t stride, std::int64_t first);

// a matrix whose step k of row i, a float or a pair of bfloat16, is at data + i row + k step, bytes
struct Left {
  const void* data;
  std::int64_t row, step;
};

// out [rows, columns] = a [rows, depth] times the packed columns from `first`, a multiple of 64; or
// that is added to it
void multiply(const Panels& panels, const Left& a, std::int64_t rows, std::int64_t first,
              std::int64_t columns, float* out, std::int64_t out_stride, bool add);

// the same of a whose rows stand a_stride elements apart
void multiply(const Panels& panels, const void* a, std::int64_t a_stride, std::int64_t rows,
              std::int64_t first, std::int64_t columns, float* out, std::int64_t out_stride);

void gemm_cpu(bool bf16, std::uintptr_t a, std::int64_t a_stride, std::int64_t rows,
              std::uintptr_t panels, std::int64_t depth, std::int64_t columns, std::uintptr_t out,
              std::int64_t out_stride, int threads);

}  // namespace fastxm
