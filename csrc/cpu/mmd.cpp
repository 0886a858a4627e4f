#include "cpu/mmd.h"

#include "cpu/mmd_problems.h"
#include "cpu/mmd_samples.h"
#include "cpu/mmd_tiles.h"
#include "numbers.h"

namespace fastxm {

void mmd_tile_cpu(const MmdKernelNumbers& kernel_numbers, const MmdTileNumbers& numbers,
                  int threads) {
  const auto kernel = struct_of<MmdKernel>(kernel_numbers);
  const auto t = struct_of<MmdTile>(numbers);
  kernel.wide ? tiles<double>(kernel, {t}, threads) : tiles<float>(kernel, {t}, threads);
}

void mmd_samples_cpu(const MmdKernelNumbers& kernel_numbers, const MmdSampleNumbers& numbers,
                     int threads) {
  const auto kernel = struct_of<MmdKernel>(kernel_numbers);
  const auto s = struct_of<MmdSamples>(numbers);
  auto* run = !s.bf16    ? samples<float, float>
              : s.halves ? samples<bfloat16, bfloat16>
                         : samples<float, bfloat16>;
  run(kernel, s, threads);
}

void mmd_problems_cpu(const MmdKernelNumbers& kernel_numbers, const MmdProblemNumbers& numbers,
                      int threads) {
  const auto kernel = struct_of<MmdKernel>(kernel_numbers);
  const auto p = struct_of<MmdProblems>(numbers);
  kernel.wide ? problems<double>(kernel, p, threads) : problems<float>(kernel, p, threads);
}

}  // namespace fastxm
