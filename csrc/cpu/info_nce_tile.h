// One tile of InfoNCE's logits: its statistics, and its gradient.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

constexpr std::int64_t kStrip = 4 * kPanel;    // columns of a tile
constexpr std::int64_t kTile = 24;             // rows of a tile: 24 KB of float32, hot in the cache
constexpr double kNothing = -1e30;             // reference of no entries
constexpr int kNear = 16;                      // how far apart exponents may share a reference
constexpr std::int64_t kStride = kStrip + 16;  // of a tile that is read by columns too

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
FASTXM_INLINE void scale_tile(const Tile<T>& t, T* row_top, T* column_top) {
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

// sums over two sets; the references are numbers
template <class T>
FASTXM_INLINE Sums<T> join(const Sums<T>& a, const Sums<T>& b) {
  T apart = a.reference - b.reference, less = exp_fast(-std::abs(apart));
  T of_a = apart < 0 ? less : T(1), of_b = apart > 0 ? less : T(1);
  return {apart > 0 ? a.reference : b.reference, of_a * a.exps + of_b * b.exps,
          of_a * a.dots + of_b * b.dots, a.plain + b.plain, a.top > b.top ? a.top : b.top};
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

// -inf, the maximum of nothing, is near everything
template <class T>
FASTXM_INLINE bool all_near(const T* values, std::int64_t n, T reference) {
  int far = 0;
#pragma omp simd reduction(| : far)
  for (std::int64_t i = 0; i < n; ++i)
    far |= !(std::abs(values[i] - reference) <= kNear || values[i] == T(-INFINITY));
  return !far;
}

// What is kept of a tile: e = exp(s - reference), which both directions share; nothing, and a
// reference of NaN, where their maxima lie too far apart for that. Rounding e to bfloat16 costs a
// gradient of bfloat16 no more than its own rounding: the positives' logits are not rounded.
template <class E>
struct alignas(64) Kept {
  float reference, positives[31];  // logits of the rows' positives
  E e[kTile * kStrip];
};

// statistics of the tile's rows are written, [5] of stride row_stride; those of its columns are
// joined into columns [5, kStrip]; kept: 0 if nothing is
template <class T, class E>
FASTXM_INLINE void fwd_tile_of(const Tile<T>& t, T* row, std::int64_t row_stride, T* columns,
                               Kept<E>* kept) {
  T row_top[kTile], top[kStrip], exps[kStrip] = {}, dots[kStrip] = {}, plain[kStrip] = {};
  scale_tile(t, row_top, top);
  T highest = T(-INFINITY);
  for (std::int64_t i = 0; i < t.rows; ++i) highest = std::max(highest, row_top[i]);
  // where all maxima are near, one exponential serves a row and a column, and can be kept
  bool near = highest > T(-INFINITY) && all_near(top, t.width, highest) &&
              all_near(row_top, t.rows, highest);
  bool one = near && !t.column_labels;
  if (kept) kept->reference = near ? static_cast<float>(highest) : NAN;
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T* s = t.s + i * kStrip;
    T reference = reference_of(row_top[i]), sum = 0, dot = 0, total = 0;
    E* keep = kept && near ? kept->e + i * kStrip : nullptr;
    T shift = exp_fast(reference - highest);
    if (one && keep) {
#pragma omp simd reduction(+ : sum, dot, total)
      for (std::int64_t j = 0; j < t.width; ++j) {
        T e = probability(s[j] - reference);
        sum += e, dot += e * s[j], total += s[j];
        e *= shift;
        exps[j] += e, dots[j] += e * s[j], plain[j] += s[j];
        from_float(e, keep[j]);
      }
    } else if (one) {
#pragma omp simd reduction(+ : sum, dot, total)
      for (std::int64_t j = 0; j < t.width; ++j) {
        T e = probability(s[j] - reference);
        sum += e, dot += e * s[j], total += s[j];
        e *= shift;
        exps[j] += e, dots[j] += e * s[j], plain[j] += s[j];
      }
    } else {
#pragma omp simd reduction(+ : sum, dot, total)
      for (std::int64_t j = 0; j < t.width; ++j) {
        T e = exp_fast(s[j] - reference), x = number(s[j]);
        sum += e, dot += e * x, total += x;
        e = exp_fast(s[j] - reference_of(top[j]));
        exps[j] += e, dots[j] += e * x, plain[j] += x;
      }
      if (keep) {
#pragma omp simd
        for (std::int64_t j = 0; j < t.width; ++j) from_float(probability(s[j] - highest), keep[j]);
      }
    }
    std::int64_t at = t.target + i;
    if (kept && at >= 0 && at < t.width) kept->positives[i] = s[at];
    store({reference, sum, dot, total, row_top[i]}, row + i, row_stride);
  }
#pragma omp simd
  for (std::int64_t j = 0; j < t.width; ++j) {
    Sums<T> here = {one ? highest : reference_of(top[j]), exps[j], dots[j], plain[j], top[j]};
    store(join(load(columns + j, kStrip), here), columns + j, kStrip);
  }
}

template <class T>
struct Terms {
  const T *rows, *columns;  // log-sum-exp, weight, even share; of the columns 0 if only rows count
  std::int64_t row_stride, column_stride;
  T smoothing;
};

template <class T>
FASTXM_INLINE T positive_gradient(T s, const T* terms, std::int64_t stride, T smoothing) {
  // p - 1 is exact where p is near 1
  return terms[stride] * (probability(s - terms[0]) - 1 + smoothing) - terms[2 * stride];
}

// out [rows, out_stride] = the gradient of s times both factors
template <class T, class Out>
FASTXM_INLINE void bwd_tile_of(const Tile<T>& t, const Terms<T>& terms, Out* out,
                               std::int64_t out_stride) {
  T unused[kTile], share[kStrip], value[kStrip];
  scale_tile(t, unused, value);
  const T* lses = terms.columns;
  const T* weights = lses + terms.column_stride;
  const T* evens = weights + terms.column_stride;
  // where all log-sum-exps are near each other, one exponential serves a row and a column
  T low = terms.rows[0], high = low;
  for (std::int64_t i = 0; i < t.rows; ++i) {
    low = std::min(low, terms.rows[i]);
    high = std::max(high, terms.rows[i]);
  }
  T middle = low + (high - low) / 2;
  bool one = terms.columns && high - low <= kNear && all_near(lses, t.width, middle);
  for (std::int64_t j = 0; one && j < t.width; ++j)
    share[j] = weights[j] * exp_fast(middle - lses[j]);
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T *s = t.s + i * kStrip, *row = terms.rows + i;
    const T lse = row[0], weight = row[terms.row_stride], even = row[2 * terms.row_stride];
    if (!terms.columns) {
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) value[j] = weight * probability(s[j] - lse) - even;
    } else if (one) {
      T shift = exp_fast(lse - middle);
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j)
        value[j] = probability(s[j] - lse) * (weight + shift * share[j]) - (even + evens[j]);
    } else {
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j)
        value[j] = weight * probability(s[j] - lse) + weights[j] * probability(s[j] - lses[j]) -
                   (even + evens[j]);
    }
    std::int64_t at = t.target + i;
    if (at >= 0 && at < t.width) {
      value[at] = positive_gradient(s[at], row, terms.row_stride, terms.smoothing);
      if (terms.columns)
        value[at] += positive_gradient(s[at], lses + at, terms.column_stride, terms.smoothing);
    }
    const T factor = t.row_factor[i];
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) {
      T ds = s[j] == T(-INFINITY) ? T(0) : value[j] * (factor * t.column_factor[j]);
      from_float(ds, out[i * out_stride + j]);
    }
  }
}

// the same from what is kept of the tile
template <class E>
FASTXM_INLINE void kept_tile_of(const Tile<float>& t, const Terms<float>& terms,
                                const Kept<E>& kept, float* out, std::int64_t out_stride) {
  float shares[kStrip] = {}, even_columns[kStrip] = {};
  const float* lses = terms.columns;
  const float* weights = lses + terms.column_stride;
  const float* evens = weights + terms.column_stride;
  if (lses) {
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) {
      shares[j] = weights[j] * probability(kept.reference - lses[j]);
      even_columns[j] = evens[j];
    }
  }
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const E* e = kept.e + i * kStrip;
    const float* row = terms.rows + i;
    const float even = row[2 * terms.row_stride], factor = t.row_factor[i];
    const float share = row[terms.row_stride] * probability(kept.reference - row[0]);
    float* to = out + i * out_stride;
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) {
      float value = to_float(e[j]) * (share + shares[j]);
      value = std::abs(value) < 1e-36f ? 0.0f : value;  // no denormal numbers, as above
      to[j] = (value - (even + even_columns[j])) * (factor * t.column_factor[j]);
    }
    std::int64_t at = t.target + i;
    if (t.column_labels) {
      std::int64_t own = t.row_labels[i];
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) to[j] = t.column_labels[j] == own ? 0.0f : to[j];
    }
    if (at >= 0 && at < t.width) {
      float s = kept.positives[i],
            value = positive_gradient(s, row, terms.row_stride, terms.smoothing);
      if (lses) value += positive_gradient(s, lses + at, terms.column_stride, terms.smoothing);
      to[at] = value * (factor * t.column_factor[at]);
    }
  }
}

}  // namespace
}  // namespace fastxm
