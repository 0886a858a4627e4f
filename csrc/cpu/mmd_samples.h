// One MMD of two samples by tiles of products, from the rows as given to their gradients. Formula:
// fastxm/ops/mmd_sums.py.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mmd_tiles.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

constexpr int64_t kLongColumn = 256;  // rows of which float adds up a column

// to [n] = x less the centre, as E; returns the sum of its squares
template <class T, class E>
FASTXM_INLINE float less_centre(const T* x, const float* centre, int64_t n, E* to) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < n; ++d) {
    from_float(to_float(x[d]) - centre[d], to[d]);
    squares += to_float(to[d]) * to_float(to[d]);
  }
  return squares;
}

// to [n] -= slope (x less the centre)
template <class T>
FASTXM_INLINE void less_own(const T* x, const float* centre, float slope, int64_t n, float* to) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) to[d] -= slope * (to_float(x[d]) - centre[d]);
}

// sums [n] += the columns of x [rows, n], whose rows stand `stride` apart
template <class T>
FASTXM_INLINE void columns_added(const T* x, int64_t rows, int64_t n, int64_t stride,
                                 double* sums) {
  for (int64_t i = 0; i < rows; i += kLongColumn) {
    float some[kPanel] = {};
    for (int64_t k = i; k < std::min(i + kLongColumn, rows); ++k)
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) some[d] += to_float(x[k * stride + d]);
    for (int64_t d = 0; d < n; ++d) sums[d] += some[d];
  }
}

#define FASTXM_ROUNDED(T, E)                                                          \
  FASTXM_MULTIARCH float centred(const T* x, const float* centre, int64_t n, E* to) { \
    return less_centre(x, centre, n, to);                                             \
  }
#define FASTXM_GIVEN(T)                                                                   \
  FASTXM_MULTIARCH void own_less(const T* x, const float* centre, float slope, int64_t n, \
                                 float* to) {                                             \
    less_own(x, centre, slope, n, to);                                                    \
  }                                                                                       \
  FASTXM_MULTIARCH void add_columns(const T* x, int64_t rows, int64_t n, int64_t stride,  \
                                    double* sums) {                                       \
    columns_added(x, rows, n, stride, sums);                                              \
  }
FASTXM_ROUNDED(float, float)
FASTXM_ROUNDED(float, bfloat16)
FASTXM_ROUNDED(bfloat16, bfloat16)
FASTXM_GIVEN(float)
FASTXM_GIVEN(bfloat16)
#undef FASTXM_ROUNDED
#undef FASTXM_GIVEN

// A sample of rows of T, multiplied as E: what products take of it, and what it gets.
template <class T, class E>
struct Given {
  int64_t count, features, depth;
  const T* x;
  const float* weights;
  float* gradient;  // 0 if it is not wanted
  Lines<E> z;       // [count, depth], the left operand
  Lines<E> panels;  // the same as the right one
  Lines<E> rows;    // less the centre, packed as the depth of the gradients' products
  std::vector<float> norms, slopes;
  std::vector<double> potentials, others;  // with its own rows, with those of the other sample

  Given(int64_t count, int64_t features, std::uintptr_t x, std::uintptr_t weights,
        std::uintptr_t gradient, bool derive)
      : count(count),
        features(features),
        depth(round_up(features, kStep<E>)),
        x(pointer<const T>(x)),
        weights(pointer<const float>(weights)),
        gradient(pointer<float>(gradient)),
        z(count * depth),
        panels(panels_size(count, depth)),
        rows(derive ? panels_size(features, round_up(count, kStep<E>)) : 0),
        norms(count),
        slopes(count),
        potentials(count),
        others(count) {}

  // Rows given as halves are exact, and so are their products: only for gradients, which are
  // sums of w (y - x), they are taken less the centre.
  void prepare(const float* centre, const float* origin, bool derive, int threads) {
    const bool apart = sizeof(T) == 2 && centre != origin;
#pragma omp parallel num_threads(threads)
    {
      Lines<E> centred_rows(derive && apart ? kPanel * depth : 0);
#pragma omp for
      for (int64_t i = 0; i < count; i += kPanel) {
        const int64_t n = std::min(kPanel, count - i);
        E *some = z.data() + i * depth, *own = apart ? centred_rows.data() : some;
        for (int64_t k = 0; k < n; ++k) {
          const T* row = x + (i + k) * features;
          E* to = some + k * depth;
          norms[i + k] = centred(row, apart ? origin : centre, features, to);
          std::fill(to + features, to + depth, E{});
          if (derive && apart) centred(row, centre, features, own + k * depth);
        }
        pack_columns(panels_of(panels.data() + i * depth, depth), some, n, depth, 1);
        if (derive)
          pack_rows(panels_of(rows.data(), round_up(count, kStep<E>)), own, n, features, depth, i,
                    1);
      }
    }
  }

  void finish(const float* centre, int threads) {
    if (!gradient) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
      own_less(x + i * features, centre, slopes[i], features, gradient + i * features);
  }
};

template <class T, class E>
MmdTile tile_of(Given<T, E>& x, Given<T, E>& y, const float* scales, MmdDiagonal diagonal,
                double* derivatives) {
  const auto address = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
  const bool within = &x == &y;
  MmdTile t = {};
  t.N = x.count, t.M = y.count, t.diagonal = static_cast<int64_t>(diagonal);
  t.bf16 = sizeof(E) == 2, t.depth = x.depth, t.features = x.features;
  t.x = address(x.z.data()), t.panels = address(y.panels.data());
  t.x_norms = address(x.norms.data()), t.y_norms = address(y.norms.data());
  t.x_weights = address(x.weights), t.y_weights = address(y.weights);
  t.x_scales = address(scales);
  t.x_potentials = address((within ? x.potentials : x.others).data());
  t.y_potentials = address((within ? y.potentials : y.others).data());
  t.x_slopes = address(x.slopes.data()), t.y_slopes = address(y.slopes.data());
  t.derivatives = address(derivatives);
  t.x_rows = address(x.rows.data()), t.y_rows = address(y.rows.data());
  t.dx = address(x.gradient), t.dy = address(y.gradient);
  return t;
}

template <class T, class E>
void samples(const MmdKernel& kernel, const MmdSamples& s, int threads) {
  const bool radial = is_radial(parts_of<float>(kernel)), derive = s.dx || s.dy;
  const int few = (s.N + s.M) * s.features < kSmall ? 1 : threads;
  Given<T, E> x(s.N, s.features, s.x, s.x_weights, s.dx, derive);
  Given<T, E> y(s.M, s.features, s.y, s.y_weights, s.dy, derive);
  std::vector<float> origin(s.features), mean(radial ? s.features : 0);
  if (radial)
#pragma omp parallel for num_threads(few)
    for (int64_t d = 0; d < s.features; d += kPanel) {
      const int64_t n = std::min(kPanel, s.features - d);
      double sums[kPanel] = {};
      add_columns(x.x + d, s.N, n, s.features, sums);
      add_columns(y.x + d, s.M, n, s.features, sums);
      for (int64_t k = 0; k < n; ++k) mean[d + k] = static_cast<float>(sums[k] / (s.N + s.M));
    }
  const float* centre = radial ? mean.data() : origin.data();
  x.prepare(centre, origin.data(), derive, few);
  y.prepare(centre, origin.data(), derive, few);

  const auto* c = pointer<const double>(s.coefficients);
  auto* derivatives = pointer<double>(s.derivatives);
  const auto scaled = [](const Given<T, E>& rows, double factor) {
    std::vector<float> scales(rows.weights, rows.weights + rows.count);
    for (float& scale : scales) scale *= static_cast<float>(factor);
    return scales;
  };
  const MmdDiagonal self = s.drop_self ? MmdDiagonal::dropped : MmdDiagonal::same;
  const MmdDiagonal paired = s.drop_paired ? MmdDiagonal::dropped : MmdDiagonal::plain;
  const auto xx = scaled(x, 2 * c[0]), yy = scaled(y, 2 * c[1]), xy = scaled(x, c[2]);
  tiles<float>(
      kernel,
      {tile_of(x, x, xx.data(), self, derivatives), tile_of(y, y, yy.data(), self, derivatives)},
      threads);
  tiles<float>(kernel, {tile_of(x, y, xy.data(), paired, derivatives)}, threads);

  // what a weight gets, and the sums
  auto* sums = pointer<double>(s.sums);
  const auto weigh = [&](const Given<T, E>& own, double factor, std::uintptr_t to) {
    double within = 0;
    for (int64_t i = 0; i < own.count; ++i) {
      within += own.weights[i] * own.potentials[i];
      pointer<float>(to)[i] =
          static_cast<float>(2 * factor * own.potentials[i] + c[2] * own.others[i]);
    }
    return within;
  };
  sums[0] = weigh(x, c[0], s.da);
  sums[1] = weigh(y, c[1], s.db);
  sums[2] = 0;
  for (int64_t i = 0; i < s.N; ++i) sums[2] += x.weights[i] * x.others[i];
  *pointer<float>(s.total) = static_cast<float>(c[0] * sums[0] + c[1] * sums[1] + c[2] * sums[2]);
  if (!radial) return;
  x.finish(centre, few);
  y.finish(centre, few);
}

}  // namespace
}  // namespace fastxm
