// Parts of a kernel of MMD.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/mmd.h"
#include "cpu/simd.h"
#include "mmd_pair.h"

namespace fastxm {
namespace {

using std::int64_t;

template <class T>
struct Part {
  MmdKind kind;
  int64_t degree, at, K;  // its parameters are at, and K further
  bool power;             // it is the fourth power of the part before
  T shape, weight;
  T rate,
      slant;  // of RBF: 2^(rate s) is its value, slant times that its slope, both times `weight`
};

// Parts of the kernel. Of RBF rates ascend; a bandwidth half the one before is its fourth power,
// two squarings for an exp. Each multiplies the rounding of the exp by 4, so that of a power none
// is taken, but where weights are rounded to bfloat16, of up to three.
template <class T>
std::vector<Part<T>> parts_of(const MmdKernel& kernel, bool bf16 = false) {
  const auto* kinds = pointer<const int64_t>(kernel.kinds);
  const T* p = pointer<const T>(kernel.parameters);
  std::vector<Part<T>> parts;
  int64_t first = 0;
  for (int64_t t = 0; t < kernel.terms; ++t, kinds += 3) {
    const std::size_t begin = parts.size();
    const int64_t K = kinds[2];
    for (int64_t q = first; q < first + K; ++q)
      parts.push_back({static_cast<MmdKind>(kinds[0]), kinds[1], q, K, false, p[q], p[q + K],
                       -p[q] * T(kLog2e), 2 * p[q] * p[q + K]});
    first += 2 * K;
    if (parts.back().kind != MmdKind::rbf) continue;
    std::stable_sort(parts.begin() + begin, parts.end(),
                     [](const Part<T>& a, const Part<T>& b) { return a.shape < b.shape; });
    const int most = bf16 ? 4 : 1;
    int chain = 0;
    for (std::size_t q = begin + 1; q < parts.size(); ++q) {
      parts[q].power = chain < most && parts[q].shape == 4 * parts[q - 1].shape;
      chain = parts[q].power ? chain + 1 : 0;
    }
  }
  return parts;
}

// Pairs of one row, or of two, with n columns, of a kernel that is all RBF.
struct RbfRows {
  const std::vector<Part<float>>& parts;
  int64_t n, own;   // own: the column that is the first row itself, or one that there is not
  float own_value;  // what the kernel counts there
  int64_t stride, out_stride;
  const float *products, *norms, *right;  // [n], of the columns: squared norms and weights
  const float *x_norms, *x_weights, *x_scales;
  double* x_potentials;        // of the rows, added to, and
  float* x_slopes;             // likewise
  float *potentials, *slopes;  // [n], added to
  void* out;                   // [n] of float, or of bfloat16 if there are pairs; 0 if not wanted
  std::uint32_t* pairs;        // [n]: those of two rows beside each other
};

template <class T>
bool is_radial(const std::vector<Part<T>>& parts) {
  return parts.front().kind != MmdKind::polynomial;
}

template <class T>
bool all_rbf(const std::vector<Part<T>>& parts) {
  return std::all_of(parts.begin(), parts.end(),
                     [](const Part<T>& part) { return part.kind == MmdKind::rbf; });
}

}  // namespace
}  // namespace fastxm
