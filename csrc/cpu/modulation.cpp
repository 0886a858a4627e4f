// Modulation on the CPU, a unit of work at a time. Formula: fastxm/ops/modulation.py.
#include "modulation.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace fastxm {
namespace {

using std::int64_t;
constexpr int64_t kChunk = 1024;  // values of a plane that are read twice while in cache
constexpr int64_t kPixels = 16;   // likewise, pixels of all channels
using Pass = ModulationPass;

template <class X, class G>
struct Args {
  using A = std::conditional_t<std::is_same_v<X, double>, double, float>;  // accumulator
  Pass pass;
  Modulation s;
  A floor;  // act(z) = max(z, floor)
  const X *x, *dout;
  X* out;  // or dx
  const G *gamma, *beta;
  const A *mean, *rstd, *p, *q;
  A *first, *second;  // mean and var, or dgamma and dbeta
};

template <class A>
FASTXM_INLINE A act(A z, A floor) {
  return z < floor ? floor : z;
}

template <class A>
FASTXM_INLINE A masked(A z, A floor, A dy) {
  return z <= floor ? A(0) : dy;
}

// NCHW: one unit is one plane (b, c), or one piece of it

template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void plane_stats(const Args<X, G>& a, int64_t unit) {
  const int64_t planes = a.s.B * a.s.C, n = a.s.h * a.s.w * a.s.k * a.s.k / a.s.parts;
  const X* x = a.x + (unit % planes * a.s.parts + unit / planes) * n;
  double mean = 0, m2 = 0;
  for (int64_t start = 0; start < n; start += kChunk, x += kChunk) {
    const int64_t len = std::min(kChunk, n - start);
    A sum = 0, square = 0, rest = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < len; ++i) sum += to_float(x[i]);
    const A centre = sum / A(len);
#pragma omp simd reduction(+ : square, rest)
    for (int64_t i = 0; i < len; ++i) {
      const A d = to_float(x[i]) - centre;
      square += d * d;
      rest += d;
    }
    // the chunk's moments about its own mean, then Chan's merge
    const double chunk = centre + double(rest) / len, delta = chunk - mean;
    mean += delta * len / (start + len);
    m2 += square - double(rest) * rest / len + delta * delta * start * len / (start + len);
  }
  a.first[unit] = A(mean);
  a.second[unit] = A(std::max(m2, 0.0) / n);
}

// the coefficients of one row of cells, repeated k times: z = (x - mean) scale + shift
template <class G, class A>
FASTXM_INLINE void upsample(const G* gamma, const G* beta, A rstd, int64_t w, int64_t k, A* scale,
                            A* shift) {
  for (int64_t j = 0; j < w; ++j) {
    const A u = (1 + A(to_float(gamma[j]))) * rstd, v = to_float(beta[j]);
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) {
      scale[j * k + i] = u;
      shift[j * k + i] = v;
    }
  }
}

template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void plane_map(const Args<X, G>& a, int64_t unit) {
  const int64_t h = a.s.h, w = a.s.w, k = a.s.k, W = w * k;
  const A mean = a.mean[unit], rstd = a.rstd[unit], floor = a.floor;
  const A p = a.p ? a.p[unit] : 0, q = a.q ? a.q[unit] : 0;
  std::vector<A> scratch(2 * W);
  A *scale = scratch.data(), *shift = scale + W;
  for (int64_t row = 0; row < h * k; ++row) {
    const int64_t cell = (unit * h + row / k) * w, at = (unit * h * k + row) * W;
    if (row % k == 0) upsample(a.gamma + cell, a.beta + cell, rstd, w, k, scale, shift);
    const X* x = a.x + at;
    X* out = a.out + at;
    if (a.pass == Pass::fwd) {
#pragma omp simd
      for (int64_t i = 0; i < W; ++i)
        from_float(act((to_float(x[i]) - mean) * scale[i] + shift[i], floor), out[i]);
    } else {
      const X* dout = a.dout + at;
#pragma omp simd
      for (int64_t i = 0; i < W; ++i) {
        const A d = to_float(x[i]) - mean;
        const A g = masked(d * scale[i] + shift[i], floor, A(to_float(dout[i])));
        from_float(g * scale[i] - p - d * q, out[i]);
      }
    }
  }
}

template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void plane_sums(const Args<X, G>& a, int64_t unit) {
  const int64_t h = a.s.h, w = a.s.w, k = a.s.k, W = w * k, rows = k / a.s.parts;
  const int64_t plane = unit % (a.s.B * a.s.C), first = unit / (a.s.B * a.s.C) * rows;
  const A mean = a.mean[plane], rstd = a.rstd[plane], floor = a.floor;
  std::vector<A> scratch(4 * W);
  A *scale = scratch.data(), *shift = scale + W, *sum = shift + W, *dot = sum + W;
  for (int64_t i = 0; i < h; ++i) {
    const int64_t cell = (plane * h + i) * w;
    upsample(a.gamma + cell, a.beta + cell, rstd, w, k, scale, shift);
    std::fill(sum, sum + 2 * W, A(0));
    for (int64_t row = first; row < first + rows; ++row) {
      const X* x = a.x + ((plane * h + i) * k + row) * W;
      const X* dout = a.dout + ((plane * h + i) * k + row) * W;
#pragma omp simd
      for (int64_t j = 0; j < W; ++j) {
        const A d = to_float(x[j]) - mean;
        const A g = masked(d * scale[j] + shift[j], floor, A(to_float(dout[j])));
        sum[j] += g;
        dot[j] += g * d;
      }
    }
    for (int64_t j = 0; j < w; ++j) {
      A g = 0, gx = 0;
#pragma omp simd reduction(+ : g, gx)
      for (int64_t l = j * k; l < j * k + k; ++l) {
        g += sum[l];
        gx += dot[l];
      }
      a.first[(unit * h + i) * w + j] = gx * rstd;
      a.second[(unit * h + i) * w + j] = g;
    }
  }
}

// NHWC: one unit is some pixels of all channels

template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void pixel_stats(const Args<X, G>& a, int64_t unit) {
  const int64_t B = a.s.B, C = a.s.C, n = a.s.h * a.s.w * a.s.k * a.s.k / a.s.parts;
  const X* x = a.x + (unit % B * a.s.parts + unit / B) * n * C;
  A *mean = a.first + unit * C, *var = a.second + unit * C;
  std::vector<A> scratch(3 * C);
  A *centre = scratch.data(), *square = centre + C, *rest = square + C;
  std::fill(mean, mean + C, A(0));
  std::fill(var, var + C, A(0));
  for (int64_t start = 0; start < n; start += kPixels, x += kPixels * C) {
    const int64_t len = std::min(kPixels, n - start);
    std::fill(centre, centre + 3 * C, A(0));
    for (int64_t i = 0; i < len; ++i)
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) centre[c] += to_float(x[i * C + c]);
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) centre[c] /= A(len);
    for (int64_t i = 0; i < len; ++i)
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const A d = to_float(x[i * C + c]) - centre[c];
        square[c] += d * d;
        rest[c] += d;
      }
    const A share = A(len) / A(start + len), both = A(start) * share;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const A delta = centre[c] + rest[c] / A(len) - mean[c];
      mean[c] += delta * share;
      var[c] += square[c] - rest[c] * rest[c] / A(len) + delta * delta * both;
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) var[c] = var[c] < 0 ? 0 : var[c] / A(n);
}

// one row of pixels
template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void pixel_map(const Args<X, G>& a, int64_t unit) {
  const int64_t C = a.s.C, w = a.s.w, k = a.s.k, H = a.s.h * k;
  const A *mean = a.mean + unit / H * C, *rstd = a.rstd + unit / H * C, floor = a.floor;
  const A *p = a.p + unit / H * C, *q = a.q + unit / H * C;
  for (int64_t j = 0; j < w * k; ++j) {
    const int64_t cell = (unit / k * w + j / k) * C, at = (unit * w * k + j) * C;
    const G *gamma = a.gamma + cell, *beta = a.beta + cell;
    const X *x = a.x + at, *dout = a.dout + at;
    X* out = a.out + at;
    if (a.pass == Pass::fwd) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const A scale = (1 + A(to_float(gamma[c]))) * rstd[c];
        from_float(act((to_float(x[c]) - mean[c]) * scale + A(to_float(beta[c])), floor), out[c]);
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const A d = to_float(x[c]) - mean[c], scale = (1 + A(to_float(gamma[c]))) * rstd[c];
        const A g = masked(d * scale + A(to_float(beta[c])), floor, A(to_float(dout[c])));
        from_float(g * scale - p[c] - d * q[c], out[c]);
      }
    }
  }
}

// a row of cells, or a piece of it
template <class X, class G, class A = typename Args<X, G>::A>
FASTXM_INLINE void pixel_sums(const Args<X, G>& a, int64_t unit) {
  const int64_t C = a.s.C, h = a.s.h, w = a.s.w, k = a.s.k, rows = k / a.s.parts;
  const int64_t band = unit % (a.s.B * h), first = unit / (a.s.B * h) * rows;
  const A *mean = a.mean + band / h * C, *rstd = a.rstd + band / h * C, floor = a.floor;
  A *dgamma = a.first + unit * w * C, *dbeta = a.second + unit * w * C;
  std::fill(dgamma, dgamma + w * C, A(0));
  std::fill(dbeta, dbeta + w * C, A(0));
  std::vector<A> scratch(2 * C);
  A *sum = scratch.data(), *dot = sum + C;
  for (int64_t cell = 0; cell < rows * w; ++cell) {
    const int64_t row = band * k + first + cell / w, j = cell % w;
    const G *gamma = a.gamma + (band * w + j) * C, *beta = a.beta + (band * w + j) * C;
    std::fill(sum, sum + 2 * C, A(0));
    for (int64_t i = 0; i < k; ++i) {
      const X *x = a.x + ((row * w + j) * k + i) * C, *dout = a.dout + ((row * w + j) * k + i) * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const A d = to_float(x[c]) - mean[c], scale = (1 + A(to_float(gamma[c]))) * rstd[c];
        const A g = masked(d * scale + A(to_float(beta[c])), floor, A(to_float(dout[c])));
        sum[c] += g;
        dot[c] += g * d;
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      dgamma[j * C + c] += dot[c] * rstd[c];
      dbeta[j * C + c] += sum[c];
    }
  }
}

template <class X, class G>
FASTXM_INLINE void any_unit(const Args<X, G>& a, int64_t unit) {
  if (a.pass == Pass::stats) return a.s.last ? pixel_stats(a, unit) : plane_stats(a, unit);
  if (a.pass == Pass::sums) return a.s.last ? pixel_sums(a, unit) : plane_sums(a, unit);
  return a.s.last ? pixel_map(a, unit) : plane_map(a, unit);
}

// a parallel region is not cloned for each instruction set, so what it calls is
#define FASTXM_UNIT(X, G) \
  FASTXM_MULTIARCH void one_unit(const Args<X, G>& a, int64_t unit) { any_unit(a, unit); }
FASTXM_UNIT(float, float)
FASTXM_UNIT(bfloat16, float)
FASTXM_UNIT(bfloat16, bfloat16)
FASTXM_UNIT(double, double)

template <class X, class G>
void run(Pass pass, const Modulation& s, int threads) {
  using A = typename Args<X, G>::A;
  const Args<X, G> a{pass,
                     s,
                     s.relu ? A(0) : -A(INFINITY),
                     pointer<const X>(s.x),
                     pointer<const X>(s.dout),
                     pointer<X>(s.out),
                     pointer<const G>(s.gamma),
                     pointer<const G>(s.beta),
                     pointer<const A>(s.mean),
                     pointer<const A>(s.rstd),
                     pointer<const A>(s.p),
                     pointer<const A>(s.q),
                     pointer<A>(s.first),
                     pointer<A>(s.second)};
  int64_t units = s.B * (s.last ? 1 : s.C);
  if (s.last && pass != Pass::stats) units *= s.h * (pass == Pass::sums ? 1 : s.k);
  if (pass == Pass::stats || pass == Pass::sums) units *= s.parts;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = 0; unit < units; ++unit) one_unit(a, unit);
}

}  // namespace

void modulation_cpu(int pass, const ModulationSizes& sizes, const ModulationAddresses& addresses,
                    int threads) {
  const Modulation s = modulation(sizes, addresses);
  const auto p = static_cast<Pass>(pass);
  if (s.x_dtype == 0 && s.gamma_dtype == 0) return run<float, float>(p, s, threads);
  if (s.x_dtype == 1 && s.gamma_dtype == 0) return run<bfloat16, float>(p, s, threads);
  if (s.x_dtype == 1 && s.gamma_dtype == 1) return run<bfloat16, bfloat16>(p, s, threads);
  if (s.x_dtype == 3 && s.gamma_dtype == 3) return run<double, double>(p, s, threads);
  throw std::invalid_argument("modulation has no CPU kernel for these dtypes");
}

}  // namespace fastxm
