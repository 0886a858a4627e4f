// Loops over the rows of one tile of InfoNCE's logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

constexpr std::int64_t kStrip = 4 * kPanel;  // columns of a tile
constexpr std::int64_t kTallest = 32;  // most rows of a tile: 32 KB of float32, hot in the cache
constexpr double kNothing = -1e30;     // reference of no entries
constexpr int kNear = 16;              // how far apart exponents may share a reference

// rows of a tile: whole register tiles, of AVX-512 and AVX2, or of AMX
template <class E>
constexpr std::int64_t kTile = sizeof(E) == 2 ? 32 : 24;

// softmax below this share is rounding noise, and denormal numbers slow the products that follow
FASTXM_INLINE float probability(float t) { return t < -69.0f ? 0.0f : exp_fast(t); }
FASTXM_INLINE double probability(double t) { return exp_fast(t); }

template <class T>
struct Tile {
  T* s;               // [rows, kStrip] logits
  const T* products;  // [rows, stride]
  std::int64_t stride, rows, width;
  std::int64_t target;  // column of row 0's positive, counted from the tile's first
  const T *row_factor, *column_factor;
  const std::int64_t *row_labels, *column_labels;  // 0 for none
};

// s = products times factors; -inf what is left out. Maxima of rows [rows] and of columns [kStrip].
template <class T>
FASTXM_INLINE void scale_tile_of(const Tile<T>& t, T* row_top, T* column_top) {
  for (std::int64_t j = 0; j < t.width; ++j) column_top[j] = T(-INFINITY);
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *from = t.products + i * t.stride, factor = t.row_factor[i];
    T *s = t.s + i * kStrip, top = T(-INFINITY);
    if (t.column_labels) {
      std::int64_t own = t.row_labels[i], positive = t.target + i;
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) {
        bool out = t.column_labels[j] == own && j != positive;
        s[j] = out ? T(-INFINITY) : from[j] * (factor * t.column_factor[j]);
      }
    } else {
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) s[j] = from[j] * (factor * t.column_factor[j]);
    }
#pragma omp simd reduction(max : top)
    for (std::int64_t j = 0; j < t.width; ++j) {
      top = s[j] > top ? s[j] : top;
      column_top[j] = s[j] > column_top[j] ? s[j] : column_top[j];
    }
    row_top[i] = top;
  }
}

template <class T>
struct Sums {
  T reference, exps, dots, plain, top;
};

template <class T>
FASTXM_INLINE Sums<T> load(const T* at, std::int64_t stride) {
  return {at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
}

template <class T>
FASTXM_INLINE void store(const Sums<T>& sums, T* at, std::int64_t stride) {
  at[0] = sums.reference, at[stride] = sums.exps, at[2 * stride] = sums.dots;
  at[3 * stride] = sums.plain, at[4 * stride] = sums.top;
}

// statistics [5, stride] of n rows or columns: those `from` are taken into them; references are
// numbers
template <class T>
FASTXM_INLINE void join_of(const T* from, std::int64_t from_stride, std::int64_t n, T* into,
                           std::int64_t stride) {
  const T *own = from, *own_exps = own + from_stride, *own_dots = own_exps + from_stride;
  const T *own_plain = own_dots + from_stride, *own_top = own_plain + from_stride;
  T *reference = into, *exps = into + stride, *dots = exps + stride, *plain = dots + stride;
  T* top = plain + stride;
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const T old = reference[j], apart = old - own[j], less = exp_fast(-std::abs(apart));
    const T of_old = apart < 0 ? less : T(1), of_own = apart > 0 ? less : T(1);
    reference[j] = apart > 0 ? old : own[j];
    exps[j] = of_old * exps[j] + of_own * own_exps[j];
    dots[j] = of_old * dots[j] + of_own * own_dots[j];
    plain[j] += own_plain[j];
    top[j] = top[j] > own_top[j] ? top[j] : own_top[j];
  }
}

template <class T>
FASTXM_INLINE T number(T x) {
  return x == T(-INFINITY) ? T(0) : x;
}

// a maximum as a reference: of nothing, one that is below every other, and yet a number
template <class T>
FASTXM_INLINE T reference_of(T top) {
  return top == T(-INFINITY) ? T(kNothing) : top;
}

// What is kept of a tile: e = exp(s - reference), which both directions share; nothing, and a
// reference of NaN, where their maxima lie too far apart for that. Rounding e to bfloat16 costs a
// gradient of bfloat16 no more than its own rounding: the positives' logits are not rounded.
template <class E>
struct alignas(64) Kept {
  float reference, positives[47];  // logits of the rows' positives
  E e[kTile<E> * kStrip];          // [panels, kTile, kPanel]
};

// row i of what is kept of a tile
template <class T, class E>
FASTXM_INLINE void keep_row(const T* e, std::int64_t width, std::int64_t i, E* kept) {
  for (std::int64_t j = 0; j < width; j += kPanel)
#pragma omp simd
    for (std::int64_t k = 0; k < std::min(kPanel, width - j); ++k)
      from_float(e[j + k], kept[j * kTile<E> + i * kPanel + k]);
}
template <class T, class E>
FASTXM_INLINE void kept_row(const E* kept, std::int64_t width, std::int64_t i, T* e) {
  for (std::int64_t j = 0; j < width; j += kPanel)
#pragma omp simd
    for (std::int64_t k = 0; k < std::min(kPanel, width - j); ++k)
      e[j + k] = to_float(kept[j * kTile<E> + i * kPanel + k]);
}

// statistics of the columns of a tile
template <class T>
struct ColumnSums {
  alignas(64) T reference[kStrip], exps[kStrip] = {}, dots[kStrip] = {}, plain[kStrip] = {},
                                   top[kStrip];
};

// Where one reference serves all rows and columns, exp(s - it) = exp(s - own) shift, which keeps
// the precision of what is near a row's own reference.
template <class T>
struct References {
  T own[kTallest], shift[kTallest];

  FASTXM_INLINE References(const T* rows, std::int64_t n, T common) {
    for (std::int64_t i = 0; i < n; ++i) {
      own[i] = rows[i];
      shift[i] = exp_fast(rows[i] - common);
    }
  }
  FASTXM_INLINE References(const T* rows, std::int64_t n) {
    std::copy(rows, rows + n, own);
    std::fill(shift, shift + n, T(1));
  }
};

// Sums of rows and columns of a tile without labels; keep: where the columns' exponentials go, or 0
template <class T, class E>
FASTXM_INLINE void shared_sums_of(const Tile<T>& t, const References<T>& references, T* row,
                                  std::int64_t row_stride, ColumnSums<T>& columns, E* keep) {
  T here[kStrip];
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *s = t.s + i * kStrip, reference = references.own[i], shift = references.shift[i];
    T sum = 0, dot = 0, total = 0;
#pragma omp simd reduction(+ : sum, dot, total)
    for (std::int64_t j = 0; j < t.width; ++j) {
      T e = probability(s[j] - reference);
      sum += e, dot += e * s[j], total += s[j];
      e *= shift;
      columns.exps[j] += e, columns.dots[j] += e * s[j], columns.plain[j] += s[j];
      here[j] = e;
    }
    if (keep) keep_row(here, t.width, i, keep);
    store({reference, sum, dot, total, reference}, row + i, row_stride);
  }
}

// the same with references of their own, and -inf for what is left out
template <class T>
FASTXM_INLINE void own_sums_of(const Tile<T>& t, const T* row_top, const T* top, T* row,
                               std::int64_t row_stride, ColumnSums<T>& columns) {
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *s = t.s + i * kStrip, reference = reference_of(row_top[i]);
    T sum = 0, dot = 0, total = 0;
#pragma omp simd reduction(+ : sum, dot, total)
    for (std::int64_t j = 0; j < t.width; ++j) {
      T e = exp_fast(s[j] - reference), x = number(s[j]);
      sum += e, dot += e * x, total += x;
      e = exp_fast(s[j] - reference_of(top[j]));
      columns.exps[j] += e, columns.dots[j] += e * x, columns.plain[j] += x;
    }
    store({reference, sum, dot, total, row_top[i]}, row + i, row_stride);
  }
}

template <class T>
struct Terms {
  const T *rows, *columns;  // log-sum-exp, weight, even share; of the columns 0 if only rows count
  std::int64_t row_stride, column_stride;
  T smoothing;
};

// what an exponential of a tile is multiplied by, rows + shifts columns, and what is taken from
// that
template <class T>
struct Shares {
  T rows[kTallest], shifts[kTallest], even_rows[kTallest];
  alignas(64) T columns[kStrip] = {}, even_columns[kStrip] = {};
};

// out [rows, stride], which may be the products = the gradient of s times both factors, but for
// positives, where one exponential serves a row and a column: kept, or (0) made of the products
// with a reference for each row
template <class T, class E>
FASTXM_INLINE void shared_gradient_of(const Tile<T>& t, const T* references,
                                      const Shares<T>& shares, const E* kept, T* out,
                                      std::int64_t stride) {
  T e[kStrip];
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T share = shares.rows[i], shift = shares.shifts[i];
    const T even = shares.even_rows[i], factor = t.row_factor[i];
    if (kept) {
      kept_row(kept, t.width, i, e);
    } else {
      const T *from = t.products + i * t.stride, reference = references[i];
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j)
        e[j] = probability(from[j] * (factor * t.column_factor[j]) - reference);
    }
    T* to = out + i * stride;
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) {
      T value = e[j] * (share + shift * shares.columns[j]);
      value = std::abs(value) < T(1e-36) ? T(0) : value;  // no denormal numbers, as above
      to[j] = (value - (even + shares.even_columns[j])) * (factor * t.column_factor[j]);
    }
  }
}

// the same where each has its own
template <class T>
FASTXM_INLINE void own_gradient_of(const Tile<T>& t, const Terms<T>& terms, T* out,
                                   std::int64_t stride) {
  const T* lses = terms.columns;
  const T *weights = lses + terms.column_stride, *evens = weights + terms.column_stride;
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *s = t.s + i * kStrip, *row = terms.rows + i, factor = t.row_factor[i];
    const T lse = row[0], weight = row[terms.row_stride], even = row[2 * terms.row_stride];
    T* to = out + i * stride;
    if (lses) {
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j)
        to[j] = weight * probability(s[j] - lse) + weights[j] * probability(s[j] - lses[j]) -
                (even + evens[j]);
    } else {
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) to[j] = weight * probability(s[j] - lse) - even;
    }
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) to[j] *= factor * t.column_factor[j];
  }
}

template <class T, class E>
FASTXM_INLINE void exponentials_of(const Tile<T>& t, const References<T>& references, E* keep) {
  T here[kStrip];
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *s = t.s + i * kStrip, reference = references.own[i], shift = references.shift[i];
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) here[j] = probability(s[j] - reference) * shift;
    keep_row(here, t.width, i, keep);
  }
}

}  // namespace
}  // namespace fastxm
