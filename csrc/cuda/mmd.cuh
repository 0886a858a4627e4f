// Device code of MMD: pairs of a tile, and the kernel at them.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "mmd.h"
#include "mmd_pair.h"

namespace fastxm {
namespace {

using std::int64_t;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 64;  // rows of a block
constexpr int kParts = 64;

// columns of a block
template <class T>
constexpr int strip_of() {
  return 2048 / sizeof(T);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// of a kernel, what the host knows
struct Parts {
  int count;
  unsigned char kind[kParts], degree[kParts];
};

template <class T>
struct Tile {
  int64_t N, M, strips;
  bool radial;
  MmdDiagonal diagonal;
  const T *products, *x_norms, *y_norms, *x_weights, *y_weights, *x_scales, *parameters;
  T *x_potentials, *x_slopes, *y_potentials, *y_slopes;
};

template <class T>
struct Part {
  T shape, weight;
  int kind, degree;
  bool power;  // it is the fourth power of the part before, which is none
};

// the parts, for all threads of a block
template <class T>
__device__ __forceinline__ void read_parts(const Parts& parts, const T* parameters, Part<T>* to) {
  if (threadIdx.x == 0)
    for (int q = 0; q < parts.count; ++q) {
      const bool rbf = parts.kind[q] == static_cast<int>(MmdKind::rbf);
      const T shape = parameters[q];
      const bool power = rbf && q > 0 && parts.kind[q - 1] == parts.kind[q] && !to[q - 1].power &&
                         shape == 4 * to[q - 1].shape;
      to[q] = {shape, parameters[parts.count + q], parts.kind[q], parts.degree[q], power};
    }
  __syncthreads();
}

template <MmdKind kKind>
using Kind = std::integral_constant<MmdKind, kKind>;

// calls f with the kind as a constant
template <class F>
__device__ __forceinline__ void with_kind(int kind, const F& f) {
  switch (static_cast<MmdKind>(kind)) {
    case MmdKind::rbf:
      return f(Kind<MmdKind::rbf>());
    case MmdKind::rational_quadratic:
      return f(Kind<MmdKind::rational_quadratic>());
    case MmdKind::laplace:
      return f(Kind<MmdKind::laplace>());
    case MmdKind::energy:
      return f(Kind<MmdKind::energy>());
    case MmdKind::polynomial:
      return f(Kind<MmdKind::polynomial>());
  }
}

template <class T>
__device__ __forceinline__ T inner_power(T s, T shape, T weight, int degree) {
  T held = 1;
  for (int d = 1; d < degree; ++d) held *= shape * s + weight;
  return held;
}

// the statistics of V pairs of row i from column j on, and the columns' weights: 0 for what is
// dropped
template <class T, int V>
__device__ __forceinline__ void read_pairs(const Tile<T>& t, int64_t i, int64_t j, T norm,
                                           T (&s)[V], T (&right)[V]) {
  const Pack<T, V> g = load<V>(t.products + i * t.M + j);
  const Pack<T, V> weight = load<V>(t.y_weights + j);
  Pack<T, V> norms{};
  if (t.radial) norms = load<V>(t.y_norms + j);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const T d2 = norm + norms.at[v] - 2 * g.at[v];
    s[v] = !t.radial ? g.at[v] : d2 < 0 ? T(0) : d2;
    right[v] = weight.at[v];
    if (t.diagonal == MmdDiagonal::plain || i != j + v) continue;
    if (t.radial) s[v] = 0;
    if (t.diagonal == MmdDiagonal::dropped) right[v] = 0;
  }
}

// values and slopes of V pairs
template <class T, int V>
__device__ __forceinline__ void evaluate(const Part<T>* parts, int count, const T (&s)[V],
                                         T (&k)[V], T (&slope)[V]) {
  T held[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) k[v] = slope[v] = 0;
  for (int q = 0; q < count; ++q) {
    const Part<T> part = parts[q];
    const auto add = [&](int v, const MmdPair<T>& pair) {
      k[v] += pair.k;
      slope[v] += pair.slope;
    };
    with_kind(part.kind, [&](auto kind) {
      constexpr MmdKind kKind = decltype(kind)::value;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T shape = part.shape, weight = part.weight, degree = static_cast<T>(part.degree);
        if constexpr (kKind == MmdKind::polynomial)
          held[v] = inner_power(s[v], shape, weight, part.degree);
        if (kKind == MmdKind::rbf && part.power)
          add(v, mmd_pair<MmdKind::rbf, true>(s[v], shape, weight, degree, held[v]));
        else
          add(v, mmd_pair<kKind, false>(s[v], shape, weight, degree, held[v]));
      }
    });
  }
}

}  // namespace
}  // namespace fastxm
