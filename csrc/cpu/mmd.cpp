#include "cpu/mmd.h"

#include <algorithm>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/gemm.h"
#include "cpu/mmd_rows.h"

namespace fastxm {
namespace {

constexpr int64_t kRows = 24;        // rows of products that are made at a time: 24 KB of float
constexpr int64_t kChunk = 48;       // rows that one thread takes
constexpr int64_t kSmall = 1 << 13;  // pairs below which threads cost more than they give

// results below the normal range become 0 at once: they cost a hundred cycles each otherwise
struct FlushToZero {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040u); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

// a parallel region is not cloned for each instruction set, so what it calls is
FASTXM_MULTIARCH void some_rows(const Rows<float>& rows) { rows_of(rows); }
FASTXM_MULTIARCH void some_rows(const Rows<double>& rows) { rows_of(rows); }

// sums that a chunk of rows has of its own, for they are added up in the order of the chunks
template <class T>
struct Sums {
  std::vector<T> potentials, slopes;  // [M]
  std::vector<double> derivatives;
  double squares = 0;
  Sums(int64_t M, int64_t size) : potentials(M), slopes(M), derivatives(size) {}
};

template <class To, class T>
void add(To* to, const T* from, int64_t n, T factor = 1) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

template <class T>
bool is_radial(const std::vector<Part<T>>& parts) {
  return parts.front().kind != MmdKind::polynomial;
}

template <class T>
void chunk_of(const MmdTile& t, const std::vector<Part<T>>& parts, int64_t begin, Sums<T>& sums) {
  const FlushToZero guard;
  alignas(64) T scratch[kRows * kStrip];
  const int64_t end = std::min(begin + kChunk, t.N), element = t.bf16 ? 2 : sizeof(T);
  auto* weights = pointer<char>(t.weights);
  const bool squared = t.square;
  for (int64_t i = begin; i < end; i += kRows)
    for (int64_t j = 0; j < t.M; j += kStrip) {
      const int64_t rows = std::min(kRows, end - i), width = std::min(kStrip, t.M - j);
      const T* products = t.products ? pointer<T>(t.products) + i * t.M + j : scratch;
      if constexpr (sizeof(T) == 4) {
        if (t.panels)
          multiply({t.bf16 != 0, t.depth, t.panels},
                   pointer<const char>(t.x) + i * t.depth * element, t.depth, rows, j, width,
                   scratch, kStrip);
      }
      const Rows<T> here = {parts,
                            is_radial(parts),
                            t.derivatives != 0,
                            static_cast<MmdDiagonal>(t.diagonal),
                            i,
                            j,
                            rows,
                            width,
                            t.products ? t.M : kStrip,
                            products,
                            pointer<const T>(t.x_norms) + i,
                            pointer<const T>(t.y_norms) + j,
                            pointer<const T>(t.x_weights) + i,
                            pointer<const T>(t.y_weights) + j,
                            pointer<const T>(t.x_scales) + i,
                            pointer<double>(t.x_potentials) + i,
                            pointer<T>(t.x_slopes) + i,
                            sums.potentials.data() + j,
                            sums.slopes.data() + j,
                            sums.derivatives.data(),
                            squared ? pointer<const double>(t.x_scales) + i : nullptr,
                            squared ? pointer<const double>(t.y_scales) + j : nullptr,
                            squared ? *pointer<const double>(t.square) : 0,
                            t.squares ? &sums.squares : nullptr,
                            t.bf16 != 0,
                            weights ? weights + (i * t.M + j) * element : weights,
                            t.M};
      some_rows(here);
    }
}

template <class T>
void tile(const MmdKernel& kernel, const MmdTile& t, int threads) {
  const std::vector<Part<T>> parts = parts_of<T>(kernel);
  const int64_t chunks = (t.N + kChunk - 1) / kChunk;
  if (t.N * t.M < kSmall) threads = 1;
  std::vector<Sums<T>> sums(chunks, Sums<T>(t.M, kernel.size));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_of(t, parts, chunk * kChunk, sums[chunk]);
  for (const Sums<T>& own : sums) {
    if (t.y_potentials) add(pointer<double>(t.y_potentials), own.potentials.data(), t.M);
    if (t.y_slopes) add(pointer<T>(t.y_slopes), own.slopes.data(), t.M);
    // a tile of pairs (i, j) and (j, i) has each of them twice
    const double once = t.y_potentials ? 1.0 : 0.5;
    if (t.derivatives)
      add(pointer<double>(t.derivatives), own.derivatives.data(), kernel.size, once);
    if (t.squares) *pointer<double>(t.squares) += once * own.squares;
  }
}

template <class T>
FASTXM_INLINE void products_of(const T* x, int64_t n, const T* y, int64_t m, int64_t D, T* turned,
                               T* products) {
  for (int64_t j = 0; j < m; ++j)
    for (int64_t d = 0; d < D; ++d) turned[d * m + j] = y[j * D + d];
  std::fill(products, products + n * m, T(0));
  for (int64_t i = 0; i < n; ++i) {
    T* to = products + i * m;
    for (int64_t d = 0; d < D; ++d) {
      const T factor = x[i * D + d], *from = turned + d * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) to[j] += factor * from[j];
    }
  }
}

// dx[i] += sum_j w[i, j] y[j], or with the roles of rows and columns changed
template <class T>
FASTXM_INLINE void spread(const T* w, int64_t row, int64_t column, int64_t n, int64_t m, const T* y,
                          int64_t D, T* dx) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const T factor = w[i * row + j * column], *from = y + j * D;
      T* to = dx + i * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) to[d] += factor * from[d];
    }
}

#define FASTXM_SMALL(T)                                                                         \
  FASTXM_MULTIARCH void small_products(const T* x, int64_t n, const T* y, int64_t m, int64_t D, \
                                       T* turned, T* products) {                                \
    products_of(x, n, y, m, D, turned, products);                                               \
  }                                                                                             \
  FASTXM_MULTIARCH void small_spread(const T* w, int64_t row, int64_t column, int64_t n,        \
                                     int64_t m, const T* y, int64_t D, T* dx) {                 \
    spread(w, row, column, n, m, y, D, dx);                                                     \
  }
FASTXM_SMALL(float)
FASTXM_SMALL(double)
#undef FASTXM_SMALL

// One of a problem's two samples: its rows, and what they get. scales and potentials differ from
// visit to visit.
template <class T>
struct Sample {
  int64_t count;
  const T *z, *norms, *weights;
  T *slopes, *gradient;
};

// the pairs of two samples, or of one with itself
template <class T>
void visit(const std::vector<Part<T>>& parts, const Sample<T>& x, const Sample<T>& y, int64_t D,
           MmdDiagonal diagonal, const T* scales, double* potentials, double* other_potentials,
           double* derivatives, std::vector<T>& room) {
  const int64_t n = x.count, m = y.count;
  room.resize(n * m + m * D + 2 * m);
  T *products = room.data(), *turned = products + n * m, *sums = turned + m * D;
  small_products(x.z, n, y.z, m, D, turned, products);
  std::fill(sums, sums + 2 * m, T(0));
  for (int64_t j = 0; j < m; j += kStrip) {
    const Rows<T> rows = {parts,
                          is_radial(parts),
                          derivatives != nullptr,
                          diagonal,
                          0,
                          j,
                          n,
                          std::min(kStrip, m - j),
                          m,
                          products + j,
                          x.norms,
                          y.norms + j,
                          x.weights,
                          y.weights + j,
                          scales,
                          potentials,
                          x.slopes,
                          sums + j,
                          sums + m + j,
                          derivatives,
                          nullptr,
                          nullptr,
                          0,
                          nullptr,
                          false,
                          products + j,
                          m};
    some_rows(rows);
  }
  if (x.gradient) small_spread(products, m, 1, n, m, y.z, D, x.gradient);
  if (!other_potentials) return;
  add(other_potentials, sums, m);
  add(y.slopes, sums + m, m);
  if (y.gradient) small_spread(products, 1, m, m, n, x.z, D, y.gradient);
}

template <class T>
Sample<T> sample_of(std::uintptr_t starts, std::uintptr_t z, std::uintptr_t norms,
                    std::uintptr_t weights, std::uintptr_t slopes, std::uintptr_t gradient,
                    int64_t D, int64_t problem) {
  const auto* at = pointer<const int64_t>(starts) + problem;
  T* d = gradient ? pointer<T>(gradient) + at[0] * D : nullptr;
  return {at[1] - at[0],
          pointer<const T>(z) + at[0] * D,
          pointer<const T>(norms) + at[0],
          pointer<const T>(weights) + at[0],
          pointer<T>(slopes) + at[0],
          d};
}

template <class T>
void problems(const MmdKernel& kernel, const MmdProblems& p, int threads) {
  const std::vector<Part<T>> parts = parts_of<T>(kernel);
  const MmdDiagonal self = p.drop_self ? MmdDiagonal::dropped : MmdDiagonal::same;
  const MmdDiagonal paired = p.drop_paired ? MmdDiagonal::dropped : MmdDiagonal::plain;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t g = 0; g < p.problems; ++g) {
    const FlushToZero guard;
    std::vector<T> room;
    std::vector<double> whole(kernel.size), half(kernel.size);
    const int64_t i = pointer<const int64_t>(p.x_starts)[g],
                  j = pointer<const int64_t>(p.y_starts)[g];
    const Sample<T> x =
        sample_of<T>(p.x_starts, p.x, p.x_norms, p.x_weights, p.x_slopes, p.dx, p.depth, g);
    const Sample<T> y =
        sample_of<T>(p.y_starts, p.y, p.y_norms, p.y_weights, p.y_slopes, p.dy, p.depth, g);
    double* by = p.derivatives ? half.data() : nullptr;
    double* none = nullptr;
    visit(parts, x, x, p.depth, self, pointer<const T>(p.xx_scales) + i,
          pointer<double>(p.xx_potentials) + i, none, by, room);
    visit(parts, y, y, p.depth, self, pointer<const T>(p.yy_scales) + j,
          pointer<double>(p.yy_potentials) + j, none, by, room);
    by = p.derivatives ? whole.data() : nullptr;
    visit(parts, x, y, p.depth, paired, pointer<const T>(p.xy_scales) + i,
          pointer<double>(p.xy_potentials) + i, pointer<double>(p.yx_potentials) + j, by, room);
    // scales of pairs within a sample count each of them twice
    for (int64_t q = 0; p.derivatives && q < kernel.size; ++q)
      pointer<double>(p.derivatives)[g * kernel.size + q] = whole[q] + half[q] / 2;
  }
}

}  // namespace

void mmd_tile_cpu(const MmdKernelNumbers& kernel_numbers, const MmdTileNumbers& numbers,
                  int threads) {
  const auto kernel = mmd_struct<MmdKernel>(kernel_numbers);
  const auto t = mmd_struct<MmdTile>(numbers);
  kernel.wide ? tile<double>(kernel, t, threads) : tile<float>(kernel, t, threads);
}

void mmd_problems_cpu(const MmdKernelNumbers& kernel_numbers, const MmdProblemNumbers& numbers,
                      int threads) {
  const auto kernel = mmd_struct<MmdKernel>(kernel_numbers);
  const auto p = mmd_struct<MmdProblems>(numbers);
  kernel.wide ? problems<double>(kernel, p, threads) : problems<float>(kernel, p, threads);
}

}  // namespace fastxm
