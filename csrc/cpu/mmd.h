// Tiles of an MMD: inner products become gradient weights. Formula: fastxm/ops/mmd_tiles.py.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

// The kernel: `terms` parts of [kind, degree, K], and the parameters [2, K] of each after the
// other. All values are float, or double if `wide`.
struct MmdKernel {
  std::int64_t wide, terms, size;  // size: of all parameters
  std::uintptr_t kinds, parameters;
};

// Products [N, M] are either given, and weights [N, M] go to `weights` if that is not 0, perhaps in
// their place; or made of x [N, depth] (of `bf16`, or float) and panels (see gemm.h), and so are
// what the weights give: dx [N, features] += w y and dy [M, features] += w' x of x_rows and y_rows,
// packed by rows. Each of dx and dy is 0 if it is not wanted.
// Added to: potentials (double), slopes (of the weights as rounded), and derivatives [size]
// (double, or 0) by the parameters. y_potentials and y_slopes are 0 where the tile has both (i, j)
// and (j, i). Of panels they may be those of x, all pairs within x: each two are then visited once.
//
// Sums of squares: to squares (double, or 0) the sum of k^2 is added, each pair once. If `square`
// (double) is not 0, weights are (x_scales[i] + y_scales[j] + square k) slope, where x_scales [N]
// and y_scales [M] are double; x_weights and y_weights are 1 then.
struct MmdTile {
  std::int64_t N, M, diagonal, bf16, depth, features;
  std::uintptr_t x, panels, products, weights, x_norms, y_norms, x_weights, y_weights, x_scales,
      x_potentials, y_potentials, x_slopes, y_slopes, derivatives, y_scales, square, squares,
      x_rows, y_rows, dx, dy;
};

// One problem, of rows x [N, features] and y [M, features] as given, of `halves` (bfloat16) or
// float, multiplied as `bf16` or as float, by tile kernels (see gemm.h). coefficients [3] (double)
// of the sums within x, within y and of both. Written: the sums [3] (double) and the total, da [N]
// and db [M]. Added to, or 0 if not wanted: dx and dy, derivatives [size] (double).
struct MmdSamples {
  std::int64_t N, M, features, halves, bf16, drop_self, drop_paired;
  std::uintptr_t x, y, x_weights, y_weights, coefficients, total, dx, dy, da, db, sums, derivatives;
};

// Many small problems, each of the rows between two entries of x_starts and y_starts (int64
// [problems + 1]). Per row: norms, weights, scales of its pairs with rows of x and y, potentials
// (double) with them, slopes, and (0 for none) gradients [N, D]. derivatives [problems, size].
struct MmdProblems {
  std::int64_t problems, depth, drop_self, drop_paired;
  std::uintptr_t x_starts, y_starts, x, y, x_norms, y_norms, x_weights, y_weights, xx_scales,
      yy_scales, xy_scales, xx_potentials, yy_potentials, xy_potentials, yx_potentials, x_slopes,
      y_slopes, dx, dy, derivatives;
};

using MmdKernelNumbers = std::array<std::uint64_t, 5>;
using MmdTileNumbers = std::array<std::uint64_t, 27>;
using MmdSampleNumbers = std::array<std::uint64_t, 19>;
using MmdProblemNumbers = std::array<std::uint64_t, 24>;

void mmd_tile_cpu(const MmdKernelNumbers& kernel, const MmdTileNumbers& tile, int threads);
void mmd_samples_cpu(const MmdKernelNumbers& kernel, const MmdSampleNumbers& samples, int threads);
void mmd_problems_cpu(const MmdKernelNumbers& kernel, const MmdProblemNumbers& problems,
                      int threads);

}  // namespace fastxm
