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
};

// Parts of the kernel. Of RBF rates ascend; a bandwidth half the one before is its fourth power,
// two squarings for an exp. A power of a power is not taken, as each multiplies the rounding of the
// exp by 4.
template <class T>
std::vector<Part<T>> parts_of(const MmdKernel& kernel) {
  const auto* kinds = pointer<const int64_t>(kernel.kinds);
  const T* p = pointer<const T>(kernel.parameters);
  std::vector<Part<T>> parts;
  int64_t first = 0;
  for (int64_t t = 0; t < kernel.terms; ++t, kinds += 3) {
    const std::size_t begin = parts.size();
    const int64_t K = kinds[2];
    for (int64_t q = first; q < first + K; ++q)
      parts.push_back({static_cast<MmdKind>(kinds[0]), kinds[1], q, K, false, p[q], p[q + K]});
    first += 2 * K;
    if (parts.back().kind != MmdKind::rbf) continue;
    std::stable_sort(parts.begin() + begin, parts.end(),
                     [](const Part<T>& a, const Part<T>& b) { return a.shape < b.shape; });
    for (std::size_t q = begin + 1; q < parts.size(); ++q)
      parts[q].power = !parts[q - 1].power && parts[q].shape == 4 * parts[q - 1].shape;
  }
  return parts;
}

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
