// One tile of an MMD: inner products become gradient weights in place. Formula:
// fastxm/ops/mmd_sums.py.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

enum class MmdKind : int { rbf, rational_quadratic, laplace, energy, polynomial };

// what the tile's pairs i = j are: pairs like others, a row with itself, or no pairs at all
enum class MmdDiagonal : int { plain, same, dropped };

// products [N, M]; x_norms, x_weights, x_scales, x_potentials, x_slopes [N]; y_* [M], of which
// y_potentials and y_slopes may be 0; parameters [2, K]. All float, or all double if `wide`.
// potentials and slopes are added to; products and slopes are written only if `gradients`.
struct MmdTile {
  std::int64_t kind, degree, wide, N, M, K, diagonal, gradients;
  std::uintptr_t products, x_norms, y_norms, x_weights, x_scales, y_weights, parameters,
      x_potentials, y_potentials, x_slopes, y_slopes;
};

using MmdSizes = std::array<std::int64_t, 8>;
using MmdAddresses = std::array<std::uintptr_t, 11>;

inline MmdTile mmd_tile(const MmdSizes& s, const MmdAddresses& a) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], a[0], a[1],
          a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]};
}

void mmd_cpu(const MmdSizes& sizes, const MmdAddresses& addresses, int threads);

}  // namespace fastxm
