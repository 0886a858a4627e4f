// Many small problems of MMD, each by one thread that keeps all its pairs. Formula: see mmd.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/mmd.h"
#include "cpu/mmd_rows.h"

namespace fastxm {
namespace {

template <class T>
FASTXM_INLINE void products_of(const T* x, int64_t n, const T* y, int64_t m, int64_t D, T* turned,
                               T* products) {
  for (int64_t j = 0; j < m; ++j)
    for (int64_t d = 0; d < D; ++d) turned[d * m + j] = y[j * D + d];
  std::fill(products, products + n * m, T(0));
  for (int64_t i = 0; i < n; ++i) {
    T* to = products + i * m;
    for (int64_t d = 0; d < D; ++d) {
      const T factor = x[i * D + d], *from = turned + d * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) to[j] += factor * from[j];
    }
  }
}

// dx[i] += sum_j w[i, j] y[j], or with the roles of rows and columns changed
template <class T>
FASTXM_INLINE void spread(const T* w, int64_t row, int64_t column, int64_t n, int64_t m, const T* y,
                          int64_t D, T* dx) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const T factor = w[i * row + j * column], *from = y + j * D;
      T* to = dx + i * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) to[d] += factor * from[d];
    }
}

#define FASTXM_SMALL(T)                                                                         \
  FASTXM_MULTIARCH void small_products(const T* x, int64_t n, const T* y, int64_t m, int64_t D, \
                                       T* turned, T* products) {                                \
    products_of(x, n, y, m, D, turned, products);                                               \
  }                                                                                             \
  FASTXM_MULTIARCH void small_spread(const T* w, int64_t row, int64_t column, int64_t n,        \
                                     int64_t m, const T* y, int64_t D, T* dx) {                 \
    spread(w, row, column, n, m, y, D, dx);                                                     \
  }
FASTXM_SMALL(float)
FASTXM_SMALL(double)
#undef FASTXM_SMALL

// One of a problem's two samples: its rows, and what they get. scales and potentials differ from
// visit to visit.
template <class T>
struct Sample {
  int64_t count;
  const T *z, *norms, *weights;
  T *slopes, *gradient;
};

// the pairs of two samples, or of one with itself
template <class T>
void visit(const std::vector<Part<T>>& parts, const Sample<T>& x, const Sample<T>& y, int64_t D,
           MmdDiagonal diagonal, const T* scales, double* potentials, double* other_potentials,
           double* derivatives, std::vector<T>& room) {
  const int64_t n = x.count, m = y.count;
  room.resize(n * m + m * D + 2 * m);
  T *products = room.data(), *turned = products + n * m, *sums = turned + m * D;
  small_products(x.z, n, y.z, m, D, turned, products);
  std::fill(sums, sums + 2 * m, T(0));
  for (int64_t j = 0; j < m; j += kStrip) {
    const Rows<T> rows = {parts,
                          is_radial(parts),
                          all_rbf(parts),
                          derivatives != nullptr,
                          diagonal,
                          0,
                          j,
                          n,
                          std::min(kStrip, m - j),
                          m,
                          products + j,
                          x.norms,
                          y.norms + j,
                          x.weights,
                          y.weights + j,
                          scales,
                          potentials,
                          x.slopes,
                          sums + j,
                          sums + m + j,
                          derivatives,
                          nullptr,
                          nullptr,
                          0,
                          nullptr,
                          products + j,
                          nullptr,
                          m,
                          1.0};
    some_rows(rows);
  }
  if (x.gradient) small_spread(products, m, 1, n, m, y.z, D, x.gradient);
  if (!other_potentials) return;
  add(other_potentials, sums, m);
  add(y.slopes, sums + m, m);
  if (y.gradient) small_spread(products, 1, m, m, n, x.z, D, y.gradient);
}

template <class T>
Sample<T> sample_of(std::uintptr_t starts, std::uintptr_t z, std::uintptr_t norms,
                    std::uintptr_t weights, std::uintptr_t slopes, std::uintptr_t gradient,
                    int64_t D, int64_t problem) {
  const auto* at = pointer<const int64_t>(starts) + problem;
  T* d = gradient ? pointer<T>(gradient) + at[0] * D : nullptr;
  return {at[1] - at[0],
          pointer<const T>(z) + at[0] * D,
          pointer<const T>(norms) + at[0],
          pointer<const T>(weights) + at[0],
          pointer<T>(slopes) + at[0],
          d};
}

template <class T>
void problems(const MmdKernel& kernel, const MmdProblems& p, int threads) {
  const std::vector<Part<T>> parts = parts_of<T>(kernel);
  const MmdDiagonal self = p.drop_self ? MmdDiagonal::dropped : MmdDiagonal::same;
  const MmdDiagonal paired = p.drop_paired ? MmdDiagonal::dropped : MmdDiagonal::plain;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t g = 0; g < p.problems; ++g) {
    [[maybe_unused]] const FlushToZero guard;
    std::vector<T> room;
    std::vector<double> whole(kernel.size), half(kernel.size);
    const int64_t i = pointer<const int64_t>(p.x_starts)[g],
                  j = pointer<const int64_t>(p.y_starts)[g];
    const Sample<T> x =
        sample_of<T>(p.x_starts, p.x, p.x_norms, p.x_weights, p.x_slopes, p.dx, p.depth, g);
    const Sample<T> y =
        sample_of<T>(p.y_starts, p.y, p.y_norms, p.y_weights, p.y_slopes, p.dy, p.depth, g);
    double* by = p.derivatives ? half.data() : nullptr;
    double* none = nullptr;
    visit(parts, x, x, p.depth, self, pointer<const T>(p.xx_scales) + i,
          pointer<double>(p.xx_potentials) + i, none, by, room);
    visit(parts, y, y, p.depth, self, pointer<const T>(p.yy_scales) + j,
          pointer<double>(p.yy_potentials) + j, none, by, room);
    by = p.derivatives ? whole.data() : nullptr;
    visit(parts, x, y, p.depth, paired, pointer<const T>(p.xy_scales) + i,
          pointer<double>(p.xy_potentials) + i, pointer<double>(p.yx_potentials) + j, by, room);
    // scales of pairs within a sample count each of them twice
    for (int64_t q = 0; p.derivatives && q < kernel.size; ++q)
      pointer<double>(p.derivatives)[g * kernel.size + q] = whole[q] + half[q] / 2;
  }
}

}  // namespace
}  // namespace fastxm
