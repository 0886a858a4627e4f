// The sigmoid loss of all pairs of two sets of rows, on the CPU. Formula: fastxm/ops/siglip.py.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

// x [rows, depth] and y [columns, depth], of float or of bfloat16 (`bf16`, depth even); y packed
// as columns and, where gradients are wanted, y and x as the depth of panels (see gemm.h), else 0.
// Writes dx [rows, depth] and dy [columns, depth], float. Row i and column i are partners if
// `paired`. `block` rows, an even number, are taken at a time.
struct SiglipGiven {
  std::int64_t bf16, rows, columns, depth, paired, block;
  std::uintptr_t x, y_columns, y_depth, x_depth, dx, dy;
};

using SiglipNumbers = std::array<std::uint64_t, 12>;

// Where gemm_level() has the dtype. Returns the loss, dscale and dbias, sums over all pairs.
std::array<double, 3> siglip_cpu(const SiglipNumbers& given, double scale, double bias,
                                 int threads);

}  // namespace fastxm
