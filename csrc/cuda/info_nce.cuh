// Device code of InfoNCE: sums over logits, and what a block is made of.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "info_nce.h"

namespace fastxm {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr double kNothing = -1e30;  // reference of no entries

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// of products and statistics
template <class X>
using Acc = std::conditional_t<std::is_same_v<X, double>, double, float>;

// runs f of a value of the dtype: float32, bfloat16, float16, float64
template <class F>
void with_dtype(int64_t dtype, F f) {
  if (dtype == 0)
    f(float());
  else if (dtype == 1)
    f(__nv_bfloat16());
  else if (dtype == 2)
    f(__half());
  else
    f(double());
}

// 1 / |row|^2; 0 of a row that is taken for a longer one, of length 1e-6
template <class A>
__device__ __forceinline__ A squared(A rnorm) {
  return rnorm > A(999999) ? A(0) : rnorm * rnorm;
}

// a reference, and over entries s: sums of e = exp(s - reference), of e s and of s, and the maximum
template <class T>
struct Sums {
  T reference, exps, dots, plain, top;
};

template <class T>
__device__ __forceinline__ Sums<T> no_sums() {
  return {T(kNothing), 0, 0, 0, -T(INFINITY)};
}

template <class T>
__device__ __forceinline__ Sums<T> read_sums(const T* at, int64_t stride) {
  return {at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride]};
}

template <class T>
__device__ __forceinline__ void write_sums(const Sums<T>& sums, T* at, int64_t stride) {
  at[0] = sums.reference;
  at[stride] = sums.exps;
  at[2 * stride] = sums.dots;
  at[3 * stride] = sums.plain;
  at[4 * stride] = sums.top;
}

// sums over two sets; the references are numbers
template <class T>
__device__ __forceinline__ Sums<T> join(const Sums<T>& a, const Sums<T>& b) {
  const T apart = a.reference - b.reference, less = exp_fast(apart < 0 ? apart : -apart);
  const T of_a = apart < 0 ? less : T(1), of_b = apart > 0 ? less : T(1);
  return {apart > 0 ? a.reference : b.reference, of_a * a.exps + of_b * b.exps,
          of_a * a.dots + of_b * b.dots, a.plain + b.plain, b.top > a.top ? b.top : a.top};
}

// sums over s(0) .. s(count - 1), which is -inf for what is left out
template <class T, class F>
__device__ __forceinline__ Sums<T> sums_of(int count, F s) {
  T top = -T(INFINITY), exps = 0, dots = 0, plain = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) top = s(k) > top ? s(k) : top;
  const T reference = top == -T(INFINITY) ? T(kNothing) : top;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const T x = s(k), e = exp_fast(x - reference), number = x == -T(INFINITY) ? T(0) : x;
    exps += e;
    dots += e * number;
    plain += number;
  }
  return {reference, exps, dots, plain, top};
}

// of a row or a column: log-sum-exp, weight of its softmax, what smoothing takes from every entry
template <class T>
struct Term {
  T lse, weight, even;
};

// what a row or a column adds to the gradient of a logit
template <class T>
__device__ __forceinline__ T gradient(T s, const Term<T>& term, bool positive, T smoothing) {
  const T p = exp_fast(s - term.lse);
  // p - 1 is exact where p is near 1
  return term.weight * (positive ? p - 1 + smoothing : p) - term.even;
}

}  // namespace
}  // namespace fastxm
