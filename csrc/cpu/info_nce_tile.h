// One tile of InfoNCE's logits: its statistics, and its gradient.
#pragma once

#include <algorithm>

#include "cpu/info_nce_avx512.h"
#include "cpu/info_nce_rows.h"

namespace fastxm {
namespace {

// -inf, the maximum of nothing, is near everything
template <class T>
FASTXM_INLINE bool all_near(const T* values, std::int64_t n, T reference) {
  int far = 0;
#pragma omp simd reduction(| : far)
  for (std::int64_t i = 0; i < n; ++i)
    far |= !(std::abs(values[i] - reference) <= kNear || values[i] == T(-INFINITY));
  return !far;
}

// logits of the rows' positives, where those are in the tile
template <class T, class To>
FASTXM_INLINE void positives_of(const Tile<T>& t, To* to) {
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const std::int64_t at = t.target + i;
    if (at >= 0 && at < t.width)
      to[i] =
          static_cast<To>(t.products[i * t.stride + at] * (t.row_factor[i] * t.column_factor[at]));
  }
}

// statistics of the tile's rows are written, [5] of stride row_stride; those of its columns are
// joined into columns [5, kStrip]; kept: 0 if nothing is
template <class T, class E>
FASTXM_INLINE void fwd_tile_of(const Tile<T>& t, T* row, std::int64_t row_stride, T* columns,
                               Kept<E>* kept) {
  T row_top[kTallest];
  ColumnSums<T> sums;
  const T* top = sums.top;
  if (kept) positives_of(t, kept->positives);
  scale_tile(t, row_top, sums.top);
  T highest = T(-INFINITY);
  for (std::int64_t i = 0; i < t.rows; ++i) highest = std::max(highest, row_top[i]);
  // where all maxima are near, one exponential serves a row and a column, and can be kept
  bool near = highest > T(-INFINITY) && all_near(top, t.width, highest) &&
              all_near(row_top, t.rows, highest);
  bool one = near && !t.column_labels;
  if (kept) kept->reference = near ? static_cast<float>(highest) : NAN;
  E* keep = kept && near ? kept->e : nullptr;
  if (one) {
    shared_sums(t, References<T>(row_top, t.rows, highest), row, row_stride, sums, keep);
  } else {
    own_sums_of(t, row_top, top, row, row_stride, sums);
    // a row of which all is left out has no maximum
    if (keep) {
      for (std::int64_t i = 0; i < t.rows; ++i) row_top[i] = std::max(row_top[i], highest - kNear);
      exponentials(t, References<T>(row_top, t.rows, highest), keep);
    }
  }
  for (std::int64_t j = 0; j < t.width; ++j)
    sums.reference[j] = one ? highest : reference_of(top[j]);
  join_of(sums.reference, kStrip, t.width, columns, kStrip);
}

// of exponentials exp(s - reference), or if own exp(s - log-sum-exp of the row), whose share needs
// no other exponential then
template <class T>
FASTXM_INLINE void shares_of(const Tile<T>& t, const Terms<T>& terms, T reference, bool own,
                             Shares<T>& to) {
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const T lse = terms.rows[i], weight = terms.rows[terms.row_stride + i];
    to.rows[i] = own ? weight : weight * probability(reference - lse);
    to.shifts[i] = own ? exp_fast(lse - reference) : T(1);
    to.even_rows[i] = terms.rows[2 * terms.row_stride + i];
  }
  if (const T* lses = terms.columns) {
    const T* weights = lses + terms.column_stride;
#pragma omp simd
    for (std::int64_t j = 0; j < t.width; ++j) {
      to.columns[j] = weights[j] * probability(reference - lses[j]);
      to.even_columns[j] = weights[terms.column_stride + j];
    }
  }
}

template <class T>
FASTXM_INLINE T positive_gradient(T s, const T* terms, std::int64_t stride, T smoothing) {
  // p - 1 is exact where p is near 1
  return terms[stride] * (probability(s - terms[0]) - 1 + smoothing) - terms[2 * stride];
}

// in out: 0 for what labels leave out, and the gradients of the positives, whose logits are s
template <class T>
FASTXM_INLINE void labels_and_positives_of(const Tile<T>& t, const Terms<T>& terms, const T* s,
                                           T* out, std::int64_t stride) {
  for (std::int64_t i = 0; i < t.rows; ++i) {
    T* to = out + i * stride;
    if (t.column_labels) {
      std::int64_t own = t.row_labels[i];
#pragma omp simd
      for (std::int64_t j = 0; j < t.width; ++j) to[j] = t.column_labels[j] == own ? T(0) : to[j];
    }
    std::int64_t at = t.target + i;
    if (at < 0 || at >= t.width) continue;
    T value = positive_gradient(s[i], terms.rows + i, terms.row_stride, terms.smoothing);
    if (terms.columns)
      value += positive_gradient(s[i], terms.columns + at, terms.column_stride, terms.smoothing);
    to[at] = value * (t.row_factor[i] * t.column_factor[at]);
  }
}

// a reference that one exponential can have for rows and columns: in the middle of their
// log-sum-exps, NaN where those are not near each other
template <class T>
FASTXM_INLINE T middle_of(const Tile<T>& t, const Terms<T>& terms) {
  T low = terms.rows[0], high = low;
  for (std::int64_t i = 0; i < t.rows; ++i) {
    low = std::min(low, terms.rows[i]);
    high = std::max(high, terms.rows[i]);
  }
  const T middle = low + (high - low) / 2;
  const bool near = high - low <= kNear;
  return near && (!terms.columns || all_near(terms.columns, t.width, middle)) ? middle : T(NAN);
}

// out [rows, stride], which may be the products = the gradient of s times both factors
template <class T>
FASTXM_INLINE void bwd_tile_of(const Tile<T>& t, const Terms<T>& terms, T* out,
                               std::int64_t stride) {
  const T middle = middle_of(t, terms);
  T positives[kTallest];
  positives_of(t, positives);
  if (middle == middle) {
    Shares<T> shares;
    shares_of(t, terms, middle, true, shares);
    shared_gradient(t, terms.rows, shares, static_cast<const T*>(nullptr), out, stride);
  } else {
    T unused[kTallest], top[kStrip];
    scale_tile(t, unused, top);
    own_gradient_of(t, terms, out, stride);
  }
  labels_and_positives_of(t, terms, positives, out, stride);
}

// the same from what is kept of the tile
template <class E>
FASTXM_INLINE void kept_tile_of(const Tile<float>& t, const Terms<float>& terms,
                                const Kept<E>& kept, float* out, std::int64_t stride) {
  Shares<float> shares;
  shares_of(t, terms, kept.reference, false, shares);
  shared_gradient(t, static_cast<const float*>(nullptr), shares, kept.e, out, stride);
  labels_and_positives_of(t, terms, kept.positives, out, stride);
}

}  // namespace
}  // namespace fastxm
