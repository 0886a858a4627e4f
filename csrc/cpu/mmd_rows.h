// Rows of a tile of MMD, a strip of columns at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/mmd.h"
#include "cpu/mmd_avx2.h"
#include "cpu/mmd_avx512.h"
#include "cpu/mmd_parts.h"
#include "cpu/simd.h"
#include "mmd_pair.h"

namespace fastxm {
namespace {

constexpr int64_t kStrip = 384;  // pairs that stay in the first cache through all parts of a kernel

template <class T>
struct Strip {
  alignas(64) T s[kStrip], k[kStrip], w[kStrip], own[kStrip];
  const T* right;   // what pairs are multiplied by: the columns' weights, or `own`
  T inner[kStrip];  // (gamma s + coef0)^(degree - 1) of a polynomial
};

// what a part adds to values and slopes of n pairs, or if kFirst is of them, and, if kNext, the
// part after it, its fourth power; returns in by[2] (by[4]) the sums of their derivatives times
// `right`
template <MmdKind kKind, bool kNext, bool kDerivatives, bool kFirst, class T>
FASTXM_INLINE void add_part(const Part<T>* part, int64_t n, Strip<T>& a, T* by) {
  const Part<T>& next = part[kNext];
  const T shape = part->shape, weight = part->weight, degree = static_cast<T>(part->degree);
  const T next_shape = next.shape, next_weight = next.weight;
  const T *s = a.s, *right = a.right, *inner = a.inner;
  T *k = a.k, *w = a.w, by_shape = 0, by_weight = 0, by_next_shape = 0, by_next_weight = 0;
#pragma omp simd reduction(+ : by_shape, by_weight, by_next_shape, by_next_weight)
  for (int64_t j = 0; j < n; ++j) {
    T held = kKind == MmdKind::polynomial ? inner[j] : T(0);
    MmdPair<T> pair = mmd_pair<kKind, false>(s[j], shape, weight, degree, held);
    if (kDerivatives) {
      by_shape += right[j] * pair.by_shape;
      by_weight += right[j] * pair.by_weight;
    }
    if (kNext) {
      const MmdPair<T> power = mmd_pair<kKind, true>(s[j], next_shape, next_weight, degree, held);
      pair.k += power.k;
      pair.slope += power.slope;
      if (kDerivatives) {
        by_next_shape += right[j] * power.by_shape;
        by_next_weight += right[j] * power.by_weight;
      }
    }
    k[j] = kFirst ? pair.k : k[j] + pair.k;
    w[j] = kFirst ? pair.slope : w[j] + pair.slope;
  }
  by[0] = by_shape, by[1] = by_weight, by[2] = by_next_shape, by[3] = by_next_weight;
}

template <bool kDerivatives, bool kFirst, class T>
FASTXM_INLINE void evaluate(const Part<T>* part, bool next, int64_t n, Strip<T>& a, T* by) {
  switch (part->kind) {
    case MmdKind::rbf:
      return next ? add_part<MmdKind::rbf, true, kDerivatives, kFirst>(part, n, a, by)
                  : add_part<MmdKind::rbf, false, kDerivatives, kFirst>(part, n, a, by);
    case MmdKind::rational_quadratic:
      return add_part<MmdKind::rational_quadratic, false, kDerivatives, kFirst>(part, n, a, by);
    case MmdKind::laplace:
      return add_part<MmdKind::laplace, false, kDerivatives, kFirst>(part, n, a, by);
    case MmdKind::energy:
      return add_part<MmdKind::energy, false, kDerivatives, kFirst>(part, n, a, by);
    case MmdKind::polynomial:
      std::fill(a.inner, a.inner + n, T(1));
      for (int64_t d = 1; d < part->degree; ++d) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) a.inner[j] *= part->shape * a.s[j] + part->weight;
      }
      return add_part<MmdKind::polynomial, false, kDerivatives, kFirst>(part, n, a, by);
  }
}

// Some rows of a tile, from row i on, against the columns of one strip, from j on.
template <class T>
struct Rows {
  const std::vector<Part<T>>& parts;
  bool radial, rbf, derive;
  MmdDiagonal diagonal;
  int64_t i, j, rows, width, stride;  // stride: of products and weights
  const T* products;
  const T *x_norms, *y_norms, *x_weights, *y_weights, *x_scales;
  double* x_potentials;             // [rows], added to
  T* x_slopes;                      // [rows], added to
  T *y_potentials, *y_slopes;       // [width], added to, of this thread
  double* derivatives;              // of all parts, added to
  const double *x_terms, *y_terms;  // [rows], [width]: MmdTile's scales where there is a square
  double square;
  double* squares;       // added to, 0 where they are not wanted
  void* weights;         // [rows, weight_stride] of T, 0 where they are not wanted
  std::uint32_t* pairs;  // 0, or weights are of bfloat16, and here two rows' beside each other
  int64_t weight_stride;
  double once;  // what derivatives and squares count: 0.5 where there is (j, i) too
};

// writes row i of weights, and gives what it holds to the columns
template <class T>
FASTXM_INLINE T write_weights(const Rows<T>& r, int64_t i, const T* w, const T* right, T scale) {
  T *out = static_cast<T*>(r.weights) + i * r.weight_stride, *y_slopes = r.y_slopes, slope = 0;
  const int64_t n = r.width;
#pragma omp simd reduction(+ : slope)
  for (int64_t j = 0; j < n; ++j) {
    out[j] = w[j] * scale * right[j];
    slope += out[j];
    y_slopes[j] += out[j];
  }
  return slope;
}

FASTXM_INLINE float write_halves(const Rows<float>& r, int64_t i, const float* w,
                                 const float* right, float scale) {
  auto* out = static_cast<bfloat16*>(r.weights) + i * r.weight_stride;
  std::uint32_t* pairs = r.pairs + i / 2 * r.weight_stride;
  float *y_slopes = r.y_slopes, slope = 0;
  const int64_t n = r.width;
  if (n % 2) out[n].bits = 0;
#ifdef FASTXM_VECTORS
  if (has_avx512()) return halves_avx512(n, w, right, scale, i % 2, out, pairs, y_slopes);
#endif
  const std::uint32_t before = i % 2 ? 0xffffu : 0u, shift = i % 2 ? 16 : 0;
#pragma omp simd reduction(+ : slope)
  for (int64_t j = 0; j < n; ++j) {
    from_float(w[j] * scale * right[j], out[j]);
    pairs[j] = (pairs[j] & before) | std::uint32_t{out[j].bits} << shift;
    slope += to_float(out[j]);
    y_slopes[j] += to_float(out[j]);
  }
  return slope;
}

template <class T>
FASTXM_INLINE void write_row(const Rows<T>& r, int64_t i, const T* w, const T* right, T scale) {
  T slope;
  if constexpr (sizeof(T) == 4)
    slope = r.pairs ? write_halves(r, i, w, right, scale) : write_weights(r, i, w, right, scale);
  else
    slope = write_weights(r, i, w, right, scale);
  r.x_slopes[i] += slope;
}

// adds up all parts for n pairs of a row, and their derivatives times right and scale
template <bool kDerivatives, class T>
FASTXM_INLINE void add_parts(const Rows<T>& r, T scale, int64_t n, Strip<T>& a) {
  const Part<T>*part = r.parts.data(), *end = part + r.parts.size();
  while (part < end) {
    const int64_t count = part + 1 < end && part[1].power ? 2 : 1;
    T by[4] = {};
    if (part == r.parts.data())
      evaluate<kDerivatives, true>(part, count == 2, n, a, by);
    else
      evaluate<kDerivatives, false>(part, count == 2, n, a, by);
    for (const T* own = by; own < by + 2 * count; own += 2, ++part) {
      if (!kDerivatives) continue;
      r.derivatives[part->at] += r.once * scale * own[0];
      r.derivatives[part->at + part->K] += r.once * scale * own[1];
    }
  }
}

// Takes row i, or two, if nothing is wanted but sums and weights and there are the instructions for
// it; returns how many. `own` is the column that is row i itself.
FASTXM_INLINE int64_t rows_at_once(const Rows<double>&, int64_t, int64_t, double) { return 0; }
FASTXM_INLINE int64_t rows_at_once(const Rows<float>& r, int64_t i, int64_t own, float own_value) {
#ifdef FASTXM_VECTORS
  const bool halves = r.weights && r.pairs, two = has_avx512() && i + 1 < r.rows;
  if (!r.rbf || r.derive || r.squares || r.x_terms) return 0;
  if (!(halves ? has_avx512() : has_avx2())) return 0;
  char* out =
      r.weights ? static_cast<char*>(r.weights) + i * r.weight_stride * (halves ? 2 : 4) : nullptr;
  if (halves && r.width % 2)
    for (int64_t k = 0; k < 1 + two; ++k)
      reinterpret_cast<bfloat16*>(out)[k * r.weight_stride + r.width].bits = 0;
  const RbfRows rows = {r.parts,
                        r.width,
                        r.diagonal == MmdDiagonal::plain ? -2 : own,
                        own_value,
                        r.stride,
                        r.weight_stride,
                        r.products + i * r.stride,
                        r.y_norms,
                        r.y_weights,
                        r.x_norms + i,
                        r.x_weights + i,
                        r.x_scales + i,
                        r.x_potentials + i,
                        r.x_slopes + i,
                        r.y_potentials,
                        r.y_slopes,
                        out,
                        halves ? r.pairs + i / 2 * r.weight_stride : nullptr};
  auto* run = halves ? (two ? rbf_rows_avx512<2, true, true> : rbf_rows_avx512<1, true, true>)
              : out  ? (two ? rbf_rows_avx512<2, true, false> : rbf_rows_avx512<1, true, false>)
                     : (two ? rbf_rows_avx512<2, false, false> : rbf_rows_avx512<1, false, false>);
  if (!has_avx512()) run = out ? rbf_row_avx2<true> : rbf_row_avx2<false>;
  run(rows);
  return 1 + two;
#else
  return 0;
#endif
}

template <class T>
FASTXM_INLINE void rows_of(const Rows<T>& r) {
  Strip<T> a;
  // of locals the compiler knows that nothing else changes them, and so it vectorises
  const int64_t n = r.width;
  const T *y_norms = r.y_norms, *y_weights = r.y_weights;
  T* y_potentials = r.y_potentials;
  T *s = a.s, *k = a.k, *w = a.w, same = 0;  // same: the kernel of a row with itself
  for (const Part<T>& part : r.parts) same += part.weight;
  for (int64_t i = 0; i < r.rows; ++i) {
    const int64_t own = r.i + i - r.j;
    const bool crossed = r.diagonal != MmdDiagonal::plain && own >= 0 && own < n;
    const bool dropped = crossed && r.diagonal == MmdDiagonal::dropped;
    const int64_t done = rows_at_once(r, i, own, r.diagonal == MmdDiagonal::dropped ? 0 : same);
    if (done) {
      i += done - 1;
      continue;
    }
    const T *g = r.products + i * r.stride, norm = r.radial ? r.x_norms[i] : T(0);
    const T weight = r.x_weights[i];
    const T scale = r.x_terms ? T(1) : r.x_scales[i];
    if (r.radial) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const T d2 = norm + y_norms[j] - 2 * g[j];
        s[j] = d2 < 0 ? T(0) : d2;
      }
    } else {
      std::copy(g, g + n, s);
    }
    if (crossed && r.radial) s[own] = 0;
    a.right = y_weights;
    if (dropped) {
      std::copy(y_weights, y_weights + n, a.own);
      a.own[own] = 0;
      a.right = a.own;
    }
    const T* right = a.right;
    if (r.derive && !r.x_terms)
      add_parts<true>(r, scale, n, a);
    else
      add_parts<false>(r, scale, n, a);
    if (dropped) k[own] = 0;
    if (dropped || (crossed && r.radial)) w[own] = 0;
    T potential = 0;
#pragma omp simd reduction(+ : potential)
    for (int64_t j = 0; j < n; ++j) {
      potential += k[j] * right[j];
      y_potentials[j] += k[j] * weight;
    }
    r.x_potentials[i] += potential;
    if (r.squares) {
      T squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < n; ++j) squares += k[j] * k[j];
      *r.squares += r.once * squares;
    }
    if (r.x_terms) {
      // the terms cancel in part, and of float they would lose the same in all pairs of a row
      const double term = r.x_terms[i], *y_terms = r.y_terms, square = r.square;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) a.own[j] = static_cast<T>(term + y_terms[j] + square * k[j]);
      if (dropped) a.own[own] = 0;
      a.right = a.own;
    }
    if (r.weights) write_row(r, i, w, a.right, scale);
    // derivatives need the value of all parts
    if (r.derive && r.x_terms) add_parts<true>(r, scale, n, a);
  }
}

// a parallel region is not cloned for each instruction set, so what it calls is
FASTXM_MULTIARCH void some_rows(const Rows<float>& rows) { rows_of(rows); }
FASTXM_MULTIARCH void some_rows(const Rows<double>& rows) { rows_of(rows); }

template <class To, class T>
void add(To* to, const T* from, int64_t n, T factor = 1) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

}  // namespace
}  // namespace fastxm
