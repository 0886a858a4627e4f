// The kernels of MMD at one pair, for C++ and CUDA: s is |x - y|^2 or <x, y> of it. Whoever
// includes this has exp_fast and log1p_fast. Formula: fastxm/ops/mmd_pairs.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTXM_PAIR __device__ __forceinline__
#else
#define FASTXM_PAIR inline __attribute__((always_inline))
#endif

namespace fastxm {

enum class MmdKind : int { rbf, rational_quadratic, laplace, energy, polynomial };

// what the pairs i = j of a tile are: pairs like others, a row with itself, or no pairs at all
enum class MmdDiagonal : int { plain, same, dropped };

// of one part of a kernel: its value, its slope, and its derivatives by its two parameters
template <class T>
struct MmdPair {
  T k, slope, by_shape, by_weight;
};

// held: of a ladder of RBF the value of the last part, of which this one is the fourth power if
// kPower; of a polynomial (gamma s + coef0)^(degree - 1)
template <MmdKind kKind, bool kPower, class T>
FASTXM_PAIR MmdPair<T> mmd_pair(T s, T shape, T weight, T degree, T& held) {
  if constexpr (kKind == MmdKind::rbf) {
    if (kPower) {
      held *= held;
      held *= held;
    } else {
      held = exp_fast(-shape * s);
    }
    const T k = weight * held;
    return {k, 2 * shape * k, -s * k, held};
  } else if constexpr (kKind == MmdKind::rational_quadratic) {
    const T u = T(0.5) / shape * s, inverse = 1 / (1 + u), log = log1p_fast(u);
    const T part = exp_fast(-shape * log), k = weight * part;
    return {k, k * inverse, k * (u * inverse - log), part};
  } else if constexpr (kKind == MmdKind::laplace) {
    const T d = std::sqrt(s), part = exp_fast(-shape * d), k = weight * part;
    return {k, d == 0 ? T(0) : shape * k / d, -d * k, part};
  } else if constexpr (kKind == MmdKind::energy) {
    const T d = std::sqrt(s), scale = shape * weight;
    return {-scale * d, d == 0 ? T(0) : scale / d, -weight * d, -shape * d};
  } else {
    const T inner = degree * held;
    return {held * (shape * s + weight), shape * inner, inner * s, inner};
  }
}

}  // namespace fastxm
