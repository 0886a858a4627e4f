#include "cpu/info_nce.h"

#include <algorithm>

#include "cpu/simd.h"

namespace fastxm {
namespace {

constexpr std::int64_t kStrip = 256;      // columns that one step of the column pass takes
constexpr std::int64_t kChunk = 2048;     // entries summed in the narrow type before the wide one
constexpr std::int64_t kSmall = 1 << 14;  // entries below which threads cost more than they give

// softmax below this share is rounding noise, and denormal numbers slow the products that follow
FASTXM_INLINE float probability(float t) { return t < -69.0f ? 0.0f : exp_fast(t); }
FASTXM_INLINE double probability(double t) { return exp_fast(t); }

template <class T>
FASTXM_INLINE void leave_out(T* s, std::int64_t columns, std::int64_t target,
                             const std::int64_t* labels) {
  std::int64_t own = labels[target];
  T positive = s[target];
#pragma omp simd
  for (std::int64_t j = 0; j < columns; ++j) s[j] = labels[j] == own ? T(-INFINITY) : s[j];
  s[target] = positive;
}

template <class T>
FASTXM_INLINE void row_pass(T* s, std::int64_t columns, std::int64_t target, T* stats,
                            std::int64_t stride, bool sums) {
  T maximum = s[0];
#pragma omp simd reduction(max : maximum)
  for (std::int64_t j = 0; j < columns; ++j) maximum = s[j] > maximum ? s[j] : maximum;
  double exps = 0, plain = 0;
  for (std::int64_t from = 0; from < columns; from += kChunk) {
    std::int64_t to = std::min(columns, from + kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t j = from; j < to; ++j) part += exp_fast(s[j] - maximum);
    exps += part;
    if (!sums) continue;
    part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t j = from; j < to; ++j) part += s[j] == T(-INFINITY) ? T(0) : s[j];
    plain += part;
  }
  stats[0] = static_cast<T>(maximum + std::log(exps));
  stats[stride] = s[target];
  stats[2 * stride] = static_cast<T>(plain);
}

// columns 0 .. width of a block of rows, width <= kStrip; stats is shifted alike
template <class T>
FASTXM_INLINE void column_pass(const T* s, std::int64_t rows, std::int64_t columns,
                               std::int64_t width, T* stats, bool sums) {
  T maximum[kStrip], part[kStrip], plain[kStrip];
  for (std::int64_t j = 0; j < width; ++j) {
    maximum[j] = stats[j];
    part[j] = plain[j] = 0;
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const T* row = s + i * columns;
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) maximum[j] = row[j] > maximum[j] ? row[j] : maximum[j];
  }
  // a column that is left out so far has -inf, which is no number to subtract
  T shift[kStrip];
  for (std::int64_t j = 0; j < width; ++j)
    shift[j] = maximum[j] == T(-INFINITY) ? T(0) : maximum[j];
  for (std::int64_t i = 0; i < rows; ++i) {
    const T* row = s + i * columns;
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) part[j] += exp_fast(row[j] - shift[j]);
    if (!sums) continue;
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) plain[j] += row[j] == T(-INFINITY) ? T(0) : row[j];
  }
  for (std::int64_t j = 0; j < width; ++j) {
    T* sum = stats + columns + j;
    *sum = *sum * exp_fast(stats[j] - shift[j]) + part[j];
    stats[j] = maximum[j];
    stats[2 * columns + j] += plain[j];
  }
}

template <class T>
FASTXM_INLINE void gradient_row(T* s, std::int64_t columns, std::int64_t target, const T* terms,
                                std::int64_t stride, const T* column_terms, T smoothing) {
  const T lse = terms[0], weight = terms[stride], even = terms[2 * stride];
  const T *lses = column_terms, *weights = column_terms + columns, *evens = weights + columns;
  // the positive by itself: p - 1 is exact where p is near 1
  T positive = weight * (probability(s[target] - lse) - 1) + (smoothing * weight - even);
  if (column_terms)
    positive += weights[target] * (probability(s[target] - lses[target]) - 1) +
                (smoothing * weights[target] - evens[target]);
  if (smoothing > 0) {
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) {
      T value = weight * probability(s[j] - lse) - even;
      if (column_terms) value += weights[j] * probability(s[j] - lses[j]) - evens[j];
      s[j] = s[j] == T(-INFINITY) ? T(0) : value;
    }
  } else if (column_terms) {
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j)
      s[j] = weight * probability(s[j] - lse) + weights[j] * probability(s[j] - lses[j]);
  } else {
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) s[j] = weight * probability(s[j] - lse);
  }
  s[target] = positive;
}

// OpenMP outlines its regions before functions are cloned for each instruction set: so the cloned
// functions take one row or strip, and the loops over them stand outside
#define FASTXM_INSTANCES(T)                                                                      \
  FASTXM_MULTIARCH void fwd_row(T* s, std::int64_t columns, std::int64_t target,                 \
                                const std::int64_t* labels, T* stats, std::int64_t stride,       \
                                bool sums) {                                                     \
    if (labels) leave_out(s, columns, target, labels);                                           \
    row_pass(s, columns, target, stats, stride, sums);                                           \
  }                                                                                              \
  FASTXM_MULTIARCH void fwd_strip(const T* s, std::int64_t rows, std::int64_t columns,           \
                                  std::int64_t width, T* stats, bool sums) {                     \
    column_pass(s, rows, columns, width, stats, sums);                                           \
  }                                                                                              \
  FASTXM_MULTIARCH void bwd_row(T* s, std::int64_t columns, std::int64_t target,                 \
                                const std::int64_t* labels, const T* terms, std::int64_t stride, \
                                const T* column_terms, T smoothing) {                            \
    if (labels) leave_out(s, columns, target, labels);                                           \
    gradient_row(s, columns, target, terms, stride, column_terms, smoothing);                    \
  }
FASTXM_INSTANCES(float)
FASTXM_INSTANCES(double)
#undef FASTXM_INSTANCES

template <class T>
void fwd(T* s, std::int64_t rows, std::int64_t columns, std::int64_t target,
         const std::int64_t* labels, T* row_stats, std::int64_t row_stride, T* column_stats,
         bool sums, int threads) {
  if (rows * columns < kSmall) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t i = 0; i < rows; ++i)
    fwd_row(s + i * columns, columns, target + i, labels, row_stats + i, row_stride, sums);
  if (!column_stats) return;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t j = 0; j < columns; j += kStrip)
    fwd_strip(s + j, rows, columns, std::min(kStrip, columns - j), column_stats + j, sums);
}

template <class T>
void bwd(T* s, std::int64_t rows, std::int64_t columns, std::int64_t target,
         const std::int64_t* labels, const T* row_terms, std::int64_t row_stride,
         const T* column_terms, T smoothing, int threads) {
  if (rows * columns < kSmall) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t i = 0; i < rows; ++i)
    bwd_row(s + i * columns, columns, target + i, labels, row_terms + i, row_stride, column_terms,
            smoothing);
}

}  // namespace

void info_nce_fwd_cpu(bool float64, std::uintptr_t s, std::int64_t rows, std::int64_t columns,
                      std::int64_t target, std::uintptr_t labels, std::uintptr_t row_stats,
                      std::int64_t row_stride, std::uintptr_t column_stats, bool sums,
                      int threads) {
  auto run = [&](auto type) {
    using T = decltype(type);
    fwd(pointer<T>(s), rows, columns, target, pointer<const std::int64_t>(labels),
        pointer<T>(row_stats), row_stride, pointer<T>(column_stats), sums, threads);
  };
  float64 ? run(double()) : run(float());
}

void info_nce_bwd_cpu(bool float64, std::uintptr_t s, std::int64_t rows, std::int64_t columns,
                      std::int64_t target, std::uintptr_t labels, std::uintptr_t row_terms,
                      std::int64_t row_stride, std::uintptr_t column_terms, double smoothing,
                      int threads) {
  auto run = [&](auto type) {
    using T = decltype(type);
    bwd(pointer<T>(s), rows, columns, target, pointer<const std::int64_t>(labels),
        pointer<const T>(row_terms), row_stride, pointer<const T>(column_terms),
        static_cast<T>(smoothing), threads);
  };
  float64 ? run(double()) : run(float());
}

}  // namespace fastxm
