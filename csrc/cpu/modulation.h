// What the CPU and CUDA passes of modulation are told. Formula: fastxm/ops/modulation.py.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

enum class ModulationPass : int { stats, fwd, sums, dx };

// x, dout, out (dx in the last pass) [B, C, h k, w k]; gamma, beta [B, C, h, w]; all of them NCHW,
// or all NHWC if `last`. mean, rstd, p = rstd m1, q = rstd^2 m2 [B, C]. first, second: mean and
// var [parts, B, C] of each piece of a plane, or dgamma and dbeta [parts, B, C, h, w].
// dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. What has neither x's nor gamma's dtype is
// float32 (float64 for 3).
struct Modulation {
  std::int64_t x_dtype, gamma_dtype, B, C, h, w, k;
  std::int64_t parts;  // pieces that a sum is split into; divides k, or h k w k for stats
  std::int64_t last, relu;
  std::uintptr_t dout, x, gamma, beta, mean, rstd, p, q, out, first, second;
};

using ModulationSizes = std::array<std::int64_t, 10>;
using ModulationAddresses = std::array<std::uintptr_t, 11>;

inline Modulation modulation(const ModulationSizes& s, const ModulationAddresses& a) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], a[0],
          a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]};
}

void modulation_cpu(int pass, const ModulationSizes& sizes, const ModulationAddresses& addresses,
                    int threads);

}  // namespace fastxm
