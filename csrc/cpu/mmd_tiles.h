// All pairs of two samples, or of one with itself, by tiles. Formula: see mmd.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mmd_rows.h"

namespace fastxm {
namespace {

// rows of products that are made at a time: whole register tiles, or tiles of AMX
constexpr int64_t kRows = 24, kHalfRows = 32;
constexpr int64_t kBlock = kStrip;     // most rows and columns of which one thread takes all pairs
constexpr int64_t kRow = kBlock + 16;  // of weights: columns do not share few sets of the cache
constexpr int64_t kSmall = 1 << 13;    // pairs below which threads cost more than they give

// what blocks of the same rows add to all, added up in the order of the rows
struct Totals {
  std::vector<double> derivatives;
  double squares = 0;
  explicit Totals(int64_t size) : derivatives(size) {}
};

// a thread's place for products and weights of a block of `size` rows and columns
template <class T>
struct Room {
  Lines<T> products{kHalfRows * kBlock};
  Lines<T> weights;            // [size, kRow], or of bfloat16
  Lines<std::uint32_t> pairs;  // of bfloat16 [size / 2, kRow]: those of two rows
  Room(const MmdTile& t, int64_t size)
      : weights(t.panels ? size * kRow : 0), pairs(t.bf16 ? size / 2 * kRow : 0) {}
};

// to [count, features] += w [count, depth] times `depth` of the packed rows, from `first` on
void spread(const MmdTile& t, std::uintptr_t rows, int64_t total, int64_t first, int64_t depth,
            const Left& w, int64_t count, float* to) {
  const int64_t step = t.bf16 ? 2 : 1, bytes = t.bf16 ? 2 : 4;
  const Panels panels = {t.bf16 != 0, round_up(depth, step), rows + first * kPanel * bytes,
                         round_up(total, step)};
  multiply(panels, w, count, 0, t.features, to, t.features, true);
}

// all pairs of `size` rows from i on and columns from j on, or of those that there are
template <class T>
void block(const MmdTile& t, const std::vector<Part<T>>& parts, int64_t i, int64_t j, int64_t size,
           Room<T>& room, Totals& totals) {
  const int64_t n = std::min(size, t.N - i), m = std::min(size, t.M - j);
  const bool mirrored = t.y_potentials && (t.y_potentials != t.x_potentials || i != j);
  const int64_t stride = t.panels ? kRow : t.M, bytes = t.bf16 ? 2 : sizeof(T);
  char* weights = t.panels ? (t.dx || t.dy ? reinterpret_cast<char*>(room.weights.data()) : nullptr)
                  : t.weights ? pointer<char>(t.weights) + (i * t.M + j) * bytes
                              : nullptr;
  const int64_t height = t.bf16 ? kHalfRows : kRows;
  for (int64_t k = 0; k < n; k += height) {
    const int64_t rows = std::min(height, n - k), at = i + k;
    alignas(64) T potentials[kBlock] = {}, slopes[kBlock] = {};
    if constexpr (sizeof(T) == 4) {
      if (t.panels)
        multiply({t.bf16 != 0, t.depth, t.panels}, pointer<const char>(t.x) + at * t.depth * bytes,
                 t.depth, rows, j, m, room.products.data(), kBlock);
    }
    const Rows<T> here = {parts,
                          is_radial(parts),
                          all_rbf(parts),
                          t.derivatives != 0,
                          static_cast<MmdDiagonal>(t.diagonal),
                          at,
                          j,
                          rows,
                          m,
                          t.panels ? kBlock : t.M,
                          t.panels ? room.products.data() : pointer<T>(t.products) + at * t.M + j,
                          pointer<const T>(t.x_norms) + at,
                          pointer<const T>(t.y_norms) + j,
                          pointer<const T>(t.x_weights) + at,
                          pointer<const T>(t.y_weights) + j,
                          pointer<const T>(t.x_scales) + at,
                          pointer<double>(t.x_potentials) + at,
                          pointer<T>(t.x_slopes) + at,
                          potentials,
                          slopes,
                          totals.derivatives.data(),
                          t.square ? pointer<const double>(t.x_scales) + at : nullptr,
                          t.square ? pointer<const double>(t.y_scales) + j : nullptr,
                          t.square ? *pointer<const double>(t.square) : 0,
                          t.squares ? &totals.squares : nullptr,
                          weights ? weights + k * stride * bytes : nullptr,
                          t.bf16 ? room.pairs.data() + k / 2 * kRow : nullptr,
                          stride,
                          mirrored ? 1.0 : 0.5};
    some_rows(here);
    if (!mirrored) continue;
    add(pointer<double>(t.y_potentials) + j, potentials, m);
    add(pointer<T>(t.y_slopes) + j, slopes, m);
  }
  if constexpr (sizeof(T) == 4) {
    const Left across = {room.weights.data(), kRow * bytes, 4};
    const Left down = {t.bf16 ? static_cast<void*>(room.pairs.data()) : room.weights.data(), 4,
                       kRow * 4};
    if (t.dx) spread(t, t.y_rows, t.M, j, m, across, n, pointer<float>(t.dx) + i * t.features);
    if (t.dy && mirrored)
      spread(t, t.x_rows, t.N, i, n, down, m, pointer<float>(t.dy) + j * t.features);
  }
}

// one tile's blocks of `size` rows and columns, and what those of the same rows add to all
struct Blocks {
  bool triangle;
  int64_t size, n, m;
  std::vector<Totals> totals;

  Blocks(const MmdTile& t, int64_t parameters) : triangle(t.y_potentials == t.x_potentials) {
    // a multiple of four or so, so that every thread has as many; in whole panels
    const int64_t most = std::max(t.N, t.M), count = round_up((most + kBlock - 1) / kBlock, 4);
    const int64_t even = count ? round_up((most + count - 1) / count, kPanel) : 0;
    const bool split = !triangle && most <= 2 * kPanel;  // lest one thread has it all
    size = std::clamp<int64_t>(even, split ? kPanel : 2 * kPanel, kBlock);
    n = (t.N + size - 1) / size, m = (t.M + size - 1) / size;
    totals.assign(n, Totals(parameters));
  }

  // which column of blocks those of row i meet in a round, or -1
  int64_t column(int64_t i, int64_t round) const {
    const int64_t rounds = std::max(n, m);
    const int64_t j = round < rounds ? (round - i + rounds) % rounds : m;
    return j >= m || (triangle && j < i) ? -1 : j;
  }
};

// Tiles that share nothing which is added to, in rounds of blocks that share neither rows nor
// columns: so each block is a thread's own, and sums are in one order for any number of threads.
template <class T>
void tiles(const MmdKernel& kernel, const std::vector<MmdTile>& given, int threads) {
  const std::vector<Part<T>> parts = parts_of<T>(kernel, given.front().bf16);
  std::vector<Blocks> blocks;
  int64_t rounds = 0, most = 0, size = 0, pairs = 0;
  for (const MmdTile& t : given) {
    blocks.emplace_back(t, kernel.size);
    most = std::max(most, blocks.back().n);
    size = std::max(size, blocks.back().size);
    rounds = std::max({rounds, blocks.back().n, blocks.back().m});
    pairs += t.N * t.M;
  }
  if (pairs < kSmall) threads = 1;
  const auto count = static_cast<int64_t>(given.size());
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const FlushToZero guard;
    Room<T> room(given.front(), size);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = 0; i < most; ++i)
        for (int64_t k = 0; k < count; ++k) {
          Blocks& own = blocks[k];
          const int64_t j = i < own.n ? own.column(i, round) : -1;
          if (j < 0) continue;
          block(given[k], parts, i * own.size, j * own.size, own.size, room, own.totals[i]);
        }
    }
  }
  for (int64_t k = 0; k < count; ++k)
    for (const Totals& own : blocks[k].totals) {
      const MmdTile& t = given[k];
      if (t.derivatives) add(pointer<double>(t.derivatives), own.derivatives.data(), kernel.size);
      if (t.squares) *pointer<double>(t.squares) += own.squares;
    }
}

}  // namespace
}  // namespace fastxm
