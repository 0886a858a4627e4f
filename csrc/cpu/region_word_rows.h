// Region-word scores: the rows of one text and one picture. Formula: fastxm/ops/region_word.py.
#pragma once

#include <algorithm>

#include "cpu/region_word_avx512.h"
#include "cpu/simd.h"

namespace fastxm {
namespace {

using std::int64_t;

constexpr double kEps = 1e-12;  // of squared norms, as in the formula

// beta [words, R]: softmax of s [words, R] over its rows, column by column; scratch [2, R]
template <class T>
FASTXM_INLINE void softmax_words(const T* s, T* beta, int64_t words, int64_t R, T* scratch) {
  T *maximum = scratch, *total = scratch + R;
  std::copy_n(s, R, maximum);
  std::fill_n(total, R, T(0));
  for (int64_t j = 1; j < words; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) maximum[r] = std::max(maximum[r], s[j * R + r]);
  }
  for (int64_t j = 0; j < words; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) {
      T e = exp_fast(s[j * R + r] - maximum[r]);
      beta[j * R + r] = e;
      total[r] += e;
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < R; ++r) total[r] = 1 / total[r];
  for (int64_t j = 0; j < words; ++j) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) beta[j * R + r] *= total[r];
  }
}

// one row: alpha = softmax(sharp beta), alpha may be beta; returns sum alpha s
template <class T>
FASTXM_INLINE T softmax_regions(const T* s, const T* beta, T* alpha, int64_t R, T sharp) {
#ifdef FASTXM_VECTORS
  if constexpr (sizeof(T) == 4)
    if (has_avx512()) return softmax_regions_avx512(s, beta, alpha, R, sharp);
#endif
  T maximum = sharp * beta[0];
#pragma omp simd reduction(max : maximum)
  for (int64_t r = 0; r < R; ++r) maximum = std::max(maximum, sharp * beta[r]);
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t r = 0; r < R; ++r) {
    T e = exp_fast(sharp * beta[r] - maximum);
    alpha[r] = e;
    total += e;
  }
  T scale = 1 / total, dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t r = 0; r < R; ++r) {
    alpha[r] *= scale;
    dot += alpha[r] * s[r];
  }
  return dot;
}

template <class T>
FASTXM_INLINE T cosine(T dot, T word_rnorm, T square) {
  return dot * word_rnorm / std::sqrt(std::max(square, static_cast<T>(kEps)));
}

// weights [words]: exp(pool m - best) of the cosines m; returns best, and their sum in total
template <class T>
FASTXM_INLINE T pool_weights(const T* dots, const T* word_rnorm, const T* square, int64_t words,
                             T pool, T* weights, T* total) {
  T best = -INFINITY;
  for (int64_t j = 0; j < words; ++j) {
    weights[j] = pool * cosine(dots[j], word_rnorm[j], square[j]);
    best = std::max(best, weights[j]);
  }
  *total = 0;
  for (int64_t j = 0; j < words; ++j) *total += weights[j] = std::exp(weights[j] - best);
  return best;
}

// sum of a b
template <class E>
FASTXM_INLINE auto product_of(const E* a, const E* b, int64_t n) {
#ifdef FASTXM_VECTORS
  if constexpr (sizeof(E) <= 4)
    if (has_avx512()) return product_avx512(a, b, n);
#endif
  decltype(to_float(*a)) sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += to_float(a[i]) * to_float(b[i]);
  return sum;
}

// products [words]: of the rows of a and b, of n elements
template <class T>
FASTXM_INLINE void multiply_rows(const T* a, const T* b, int64_t n, T* products, int64_t words) {
  for (int64_t j = 0; j < words; ++j) products[j] = product_of(a + j * n, b + j * n, n);
}

// the score of a text; scratch [words]
template <class T>
FASTXM_INLINE T pool_words(const T* dots, const T* word_rnorm, const T* square, int64_t words,
                           T pool, T* scratch) {
  T total, best = pool_weights(dots, word_rnorm, square, words, pool, scratch, &total);
  return words ? (best + std::log(total)) / pool : static_cast<T>(-INFINITY);
}

// g: what ds takes through the softmax over regions; ds: what it takes as a factor of <w, c>; twice
// may be 0
template <class T>
FASTXM_INLINE void gradient_row(const T* s, const T* alpha, const T* h, T* g, T* ds, T* twice,
                                int64_t R, T ddot, T dsquare, T sharp) {
  T inner = 0;
#pragma omp simd reduction(+ : inner)
  for (int64_t r = 0; r < R; ++r) {
    g[r] = ddot * s[r] + 2 * dsquare * h[r];
    inner += alpha[r] * g[r];
  }
#pragma omp simd
  for (int64_t r = 0; r < R; ++r) {
    g[r] = sharp * alpha[r] * (g[r] - inner);
    ds[r] = ddot * alpha[r];
  }
  if (!twice) return;
#pragma omp simd
  for (int64_t r = 0; r < R; ++r) twice[r] = 2 * dsquare * alpha[r];
}

// through the softmax over words: ds += beta (g - sum_j beta g); inner [R] is scratch
template <class T>
FASTXM_INLINE void add_through_words(T* ds, const T* beta, const T* g, int64_t words, int64_t R,
                                     T* inner) {
  std::fill_n(inner, R, T(0));
  for (int64_t k = 0; k < words; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) inner[r] += beta[k * R + r] * g[k * R + r];
  }
  for (int64_t k = 0; k < words; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) ds[k * R + r] += beta[k * R + r] * (g[k * R + r] - inner[r]);
  }
}

template <class T>
FASTXM_INLINE void attend_text(const T* s, T* alpha, T* dots, int64_t words, int64_t R, T sharp,
                               bool word_softmax, T* scratch) {
  if (word_softmax && words) softmax_words(s, alpha, words, R, scratch);
  for (int64_t j = 0; j < words; ++j) {
    const T* beta = word_softmax ? alpha + j * R : s + j * R;
    dots[j] = softmax_regions(s + j * R, beta, alpha + j * R, R, sharp);
  }
}

// scratch: weights [words], g [R]; or weights [words], g and beta [words, R], columns [2, R]
int64_t gradient_scratch(int64_t words, int64_t R, bool word_softmax) {
  return words + (word_softmax ? 2 * (words + 1) * R : R);
}

// twice [words, R] or dsquares [words] may be 0
template <class T>
FASTXM_INLINE void gradient_text(const T* s, T* ds, const T* alpha, const T* h, T* twice,
                                 const T* dots, const T* word_rnorm, const T* square, int64_t words,
                                 int64_t R, T sharp, T pool, bool word_softmax, T dscore, T* radial,
                                 T* dsquares, T* scratch) {
  if (!words) return;
  T *weights = scratch, *g = weights + words;
  T* beta = word_softmax ? g + words * R : nullptr;
  T* columns = word_softmax ? beta + words * R : nullptr;
  if (word_softmax) softmax_words(s, beta, words, R, columns);
  T total;
  pool_weights(dots, word_rnorm, square, words, pool, weights, &total);
  for (int64_t j = 0; j < words; ++j) {
    T *row = ds + j * R, *g_row = word_softmax ? g + j * R : g;
    T rnorm = 1 / std::sqrt(std::max(square[j], static_cast<T>(kEps)));
    T m = dots[j] * word_rnorm[j] * rnorm, dm = dscore * weights[j] / total;
    T ddot = dm * word_rnorm[j] * rnorm;
    T dsquare = square[j] > kEps ? -dm * m * rnorm * rnorm / 2 : T(0);
    gradient_row(s + j * R, alpha + j * R, h + j * R, g_row, row, twice ? twice + j * R : twice, R,
                 ddot, dsquare, sharp);
    if (dsquares) dsquares[j] = dsquare;
    radial[j] = -dm * m * word_rnorm[j] * word_rnorm[j];
    if (word_softmax) continue;
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) row[r] += g_row[r];
  }
  if (word_softmax) add_through_words(ds, beta, g, words, R, columns);
}

// OpenMP outlines its regions before functions are cloned for each instruction set: so the cloned
// functions take one text, and the loops over texts stand outside
#define FASTXM_INSTANCES(T)                                                                        \
  FASTXM_MULTIARCH void attend(const T* s, T* alpha, T* dots, int64_t words, int64_t R, T sharp,   \
                               bool word_softmax, T* scratch) {                                    \
    attend_text(s, alpha, dots, words, R, sharp, word_softmax, scratch);                           \
  }                                                                                                \
  FASTXM_MULTIARCH void product_rows(const T* a, const T* b, int64_t n, T* out, int64_t words) {   \
    multiply_rows(a, b, n, out, words);                                                            \
  }                                                                                                \
  FASTXM_MULTIARCH T pooled(const T* dots, const T* word_rnorm, const T* square, int64_t words,    \
                            T pool, T* scratch) {                                                  \
    return pool_words(dots, word_rnorm, square, words, pool, scratch);                             \
  }                                                                                                \
  FASTXM_MULTIARCH void differentiate(                                                             \
      const T* s, T* ds, const T* alpha, const T* h, T* twice, const T* dots, const T* word_rnorm, \
      const T* square, int64_t words, int64_t R, T sharp, T pool, bool word_softmax, T dscore,     \
      T* radial, T* dsquares, T* scratch) {                                                        \
    gradient_text(s, ds, alpha, h, twice, dots, word_rnorm, square, words, R, sharp, pool,         \
                  word_softmax, dscore, radial, dsquares, scratch);                                \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(double)
#undef FASTXM_INSTANCES

}  // namespace
}  // namespace fastxm
