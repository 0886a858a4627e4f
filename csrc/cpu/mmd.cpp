#include "mmd.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastxm {
namespace {

using std::int64_t;

constexpr int64_t kRows = 32;    // rows that one thread takes at a time
constexpr int64_t kStrip = 256;  // pairs that stay in the first cache through all parts of a kernel

// results below the normal range become 0 at once: they cost a hundred cycles each otherwise
struct FlushToZero {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040u); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

// log v for finite v >= 1: v = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m-1)/(m+1))
FASTXM_INLINE float log_fast(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const std::uint32_t shifted = bits - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
  bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  std::memcpy(&m, &bits, 4);
  const float z = (m - 1) / (m + 1), z2 = z * z;
  float p = 1.0f / 9;
  p = std::fma(p, z2, 1.0f / 7);
  p = std::fma(p, z2, 1.0f / 5);
  p = std::fma(p, z2, 1.0f / 3);
  const float tail = std::fma(2 * z * z2, p, e * 1.42860682030941723e-6f);
  return std::fma(e, 0.693145751953125f, 2 * z + tail);
}
FASTXM_INLINE double log_fast(double v) { return std::log(v); }

template <class T>
struct Mixture {
  MmdKind kind;
  int64_t degree;
  std::vector<T> shapes, weights;
  std::vector<char> powers;  // part q of an RBF ladder is part q - 1 to the fourth
};

// rates ascend; a bandwidth half the one before is its fourth power, two squarings for an exp. A
// power of a power is not taken, as each multiplies the rounding of the exp by 4
template <class T>
Mixture<T> mixture(const MmdTile& tile) {
  const T* p = pointer<const T>(tile.parameters);
  Mixture<T> mix{static_cast<MmdKind>(tile.kind), tile.degree, {}, {}, {}};
  std::vector<int64_t> order(tile.K);
  for (int64_t q = 0; q < tile.K; ++q) order[q] = q;
  std::stable_sort(order.begin(), order.end(), [p](int64_t a, int64_t b) { return p[a] < p[b]; });
  for (int64_t q : order) {
    mix.powers.push_back(!mix.powers.empty() && !mix.powers.back() &&
                         p[q] == 4 * mix.shapes.back());
    mix.shapes.push_back(p[q]);
    mix.weights.push_back(p[tile.K + q]);
  }
  return mix;
}

// n statistics s to kernel values k and slopes w

template <class T>
FASTXM_INLINE void rbf(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w, T* power) {
  for (std::size_t q = 0; q < mix.shapes.size(); ++q) {
    const T rate = mix.shapes[q], weight = mix.weights[q], slope = 2 * rate * weight;
    if (mix.powers[q]) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) power[j] *= power[j];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) power[j] *= power[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) power[j] = exp_fast(-rate * s[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      k[j] += weight * power[j];
      w[j] += slope * power[j];
    }
  }
}

template <class T>
FASTXM_INLINE void rational_quadratic(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w) {
  for (std::size_t q = 0; q < mix.shapes.size(); ++q) {
    const T alpha = mix.shapes[q], weight = mix.weights[q], scale = T(0.5) / alpha;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T u = scale * s[j], v = 1 + u, inverse = 1 / v;
      const T lost = u - (v - 1);  // what rounding 1 + u left out
      const T part = weight * exp_fast(-alpha * (log_fast(v) + lost * inverse));
      k[j] += part;
      w[j] += part * inverse;
    }
  }
}

template <class T>
FASTXM_INLINE void laplace(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w) {
  for (std::size_t q = 0; q < mix.shapes.size(); ++q) {
    const T rate = mix.shapes[q], weight = mix.weights[q];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T d = std::sqrt(s[j]), part = weight * exp_fast(-rate * d);
      k[j] += part;
      w[j] += d == 0 ? T(0) : rate * part / d;
    }
  }
}

template <class T>
FASTXM_INLINE void energy(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w) {
  for (std::size_t q = 0; q < mix.shapes.size(); ++q) {
    const T scale = mix.shapes[q] * mix.weights[q];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T d = std::sqrt(s[j]);
      k[j] -= scale * d;
      w[j] += d == 0 ? T(0) : scale / d;
    }
  }
}

template <class T>
FASTXM_INLINE void polynomial(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w) {
  const T gamma = mix.shapes[0], offset = mix.weights[0], slope = gamma * T(mix.degree);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T base = gamma * s[j] + offset;
    T power = 1;
    for (int64_t d = 1; d < mix.degree; ++d) power *= base;
    k[j] = power * base;
    w[j] = power * slope;
  }
}

template <class T>
FASTXM_INLINE void evaluate(const Mixture<T>& mix, int64_t n, const T* s, T* k, T* w, T* power) {
  std::fill(k, k + n, T(0));
  std::fill(w, w + n, T(0));
  if (mix.kind == MmdKind::rbf) return rbf(mix, n, s, k, w, power);
  if (mix.kind == MmdKind::rational_quadratic) return rational_quadratic(mix, n, s, k, w);
  if (mix.kind == MmdKind::laplace) return laplace(mix, n, s, k, w);
  if (mix.kind == MmdKind::energy) return energy(mix, n, s, k, w);
  return polynomial(mix, n, s, k, w);
}

// kRows rows of the tile; column sums go to this unit's own sums [2, M], added up in order later
template <class T>
FASTXM_INLINE void rows_of_tile(const MmdTile& tile, const Mixture<T>& mix, int64_t unit, T* sums) {
  const FlushToZero guard;
  const T *xn = pointer<const T>(tile.x_norms), *yn = pointer<const T>(tile.y_norms);
  const T *xa = pointer<const T>(tile.x_weights), *ya = pointer<const T>(tile.y_weights);
  const T* scales = pointer<const T>(tile.x_scales);
  const bool radial = mix.kind != MmdKind::polynomial;
  const auto diagonal = static_cast<MmdDiagonal>(tile.diagonal);
  T *potentials = sums, *slopes = sums + tile.M;
  alignas(64) T s[kStrip], k[kStrip], w[kStrip], power[kStrip];
  for (int64_t i = unit * kRows; i < std::min((unit + 1) * kRows, tile.N); ++i) {
    T potential = 0, slope = 0;
    for (int64_t j0 = 0; j0 < tile.M; j0 += kStrip) {
      const int64_t n = std::min(kStrip, tile.M - j0);
      T* g = pointer<T>(tile.products) + i * tile.M + j0;
      const T norm = xn[i], weight = xa[i], scale = scales[i];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const T d2 = norm + yn[j0 + j] - 2 * g[j];
        s[j] = radial ? (d2 < 0 ? T(0) : d2) : g[j];
      }
      const bool crossed = diagonal != MmdDiagonal::plain && i >= j0 && i < j0 + n;
      if (crossed && radial) s[i - j0] = 0;
      evaluate(mix, n, s, k, w, power);
      if (crossed && (radial || diagonal == MmdDiagonal::dropped)) w[i - j0] = 0;
      if (crossed && diagonal == MmdDiagonal::dropped) k[i - j0] = 0;
#pragma omp simd reduction(+ : potential)
      for (int64_t j = 0; j < n; ++j) {
        potential += k[j] * ya[j0 + j];
        potentials[j0 + j] += k[j] * weight;
      }
      if (!tile.gradients) continue;
#pragma omp simd reduction(+ : slope)
      for (int64_t j = 0; j < n; ++j) {
        g[j] = w[j] * scale * ya[j0 + j];
        slope += g[j];
        slopes[j0 + j] += g[j];
      }
    }
    pointer<T>(tile.x_potentials)[i] += potential;
    if (tile.gradients) pointer<T>(tile.x_slopes)[i] += slope;
  }
}

// a parallel region is not cloned for each instruction set, so what it calls is
FASTXM_MULTIARCH void one_unit(const MmdTile& tile, const Mixture<float>& mix, int64_t unit,
                               float* sums) {
  rows_of_tile(tile, mix, unit, sums);
}
FASTXM_MULTIARCH void one_unit(const MmdTile& tile, const Mixture<double>& mix, int64_t unit,
                               double* sums) {
  rows_of_tile(tile, mix, unit, sums);
}

template <class T>
void run(const MmdTile& tile, int threads) {
  const Mixture<T> mix = mixture<T>(tile);
  const int64_t units = (tile.N + kRows - 1) / kRows;
  std::vector<T> sums(units * 2 * tile.M);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = 0; unit < units; ++unit)
    one_unit(tile, mix, unit, sums.data() + unit * 2 * tile.M);
  if (!tile.y_potentials) return;
  T *potentials = pointer<T>(tile.y_potentials), *slopes = pointer<T>(tile.y_slopes);
  for (int64_t unit = 0; unit < units; ++unit) {
    const T* own = sums.data() + unit * 2 * tile.M;
    for (int64_t j = 0; j < tile.M; ++j) potentials[j] += own[j];
    if (tile.gradients)
      for (int64_t j = 0; j < tile.M; ++j) slopes[j] += own[tile.M + j];
  }
}

}  // namespace

void mmd_cpu(const MmdSizes& sizes, const MmdAddresses& addresses, int threads) {
  const MmdTile tile = mmd_tile(sizes, addresses);
  if (tile.wide) return run<double>(tile, threads);
  run<float>(tile, threads);
}

}  // namespace fastxm
