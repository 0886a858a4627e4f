// What the tiles of region-word scores multiply by: all words in chunks, and one picture's panels.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/region_word.h"
#include "cpu/region_word_factors.h"
#include "cpu/region_word_rows.h"

namespace fastxm {
namespace {

constexpr int64_t kWords = 96;  // of a tile, in whole texts

// Tiles whose words are the depth of one product. Of float that is one, all of which stays in the
// second cache level; tiles of AMX pay for each time that they are added to a sum.
template <class E>
constexpr int64_t kTiles = sizeof(E) == 2 ? 4 : 1;

// Whole texts, of at most kWords words if there are several. Its words stand in the panels of all
// words from `place` on, and in those of its product's from `own` on; the product is made after the
// last of its chunks, and begins at `first` in the panels.
struct Chunk {
  int64_t text, texts, word, words, place, own, first;
  bool last;
};

// What is given, and its words in chunks.
template <class E>
struct Texts {
  const RegionWordGiven& g;
  int64_t K, R, D, width, places = 0;
  int64_t longest = 0, most = 0, depth = 0;  // words of a text, of a chunk, places of a product
  const int64_t* starts;
  std::vector<Chunk> chunks;

  explicit Texts(const RegionWordGiven& given)
      : g(given),
        K(g.words),
        R(g.regions),
        D(g.depth),
        width(round_up(R, kStep<E>)),
        starts(pointer<const int64_t>(g.starts)) {
    for (int64_t t = 0; t < g.texts; ++t) {
      const int64_t n = starts[t + 1] - starts[t];
      if (chunks.empty() || chunks.back().words + n > kWords)
        chunks.push_back({t, 0, starts[t], 0, 0, 0, 0, false});
      chunks.back().texts += 1, chunks.back().words += n;
      longest = std::max(longest, n);
    }
    if (chunks.empty()) chunks.push_back({});  // no texts give 0 to every picture
    const int64_t count = chunks.size();
    for (int64_t i = 0, first = 0; i < count; ++i) {
      Chunk& c = chunks[i];
      if (i % kTiles<E> == 0) first = places;
      c.place = places, c.own = places - first, c.first = first;
      places += round_up(c.words, kStep<E>);
      c.last = i % kTiles<E> == kTiles<E> - 1 || i == count - 1;
      most = std::max(most, c.words), depth = std::max(depth, places - first);
    }
  }

  const E* picture(int64_t i) const { return pointer<const E>(g.x) + i * R * D; }
  const E* words(int64_t k) const { return pointer<const E>(g.w) + k * D; }
};

inline void multiply_rows(const Panels& by, const void* a, int64_t stride, int64_t n,
                          int64_t columns, float* out, bool add = false) {
  multiply(by, a, stride, n, 0, columns, out, columns, add);
}

// Writes what is above the diagonal of a symmetric matrix [n, n], of which all columns of panels
// are there from the panel's first row on.
inline void mirror(int64_t n, float* matrix) {
  for (int64_t j = 0, below = kPanel; below < n; j = below, below += kPanel)
    transpose(matrix + below * n + j, n, n - below, kPanel, matrix + j * n + below, n);
}

// The panels of one picture, in a thread's own room: of its rows as columns, of its rows as the
// depth, and of the rows' products with each other.
template <class E>
struct Picture {
  const Texts<E>& t;
  Panels rows, columns, gram;
  const E* unit;  // its rows, of norm 1 unless words compete for them
  float longest;  // squared norm of these
  Lines<E> across, scaled;
  Lines<float> products, packed, norms, factors;

  explicit Picture(const Texts<E>& texts)
      : t(texts),
        across(panels_size(t.R, t.D)),
        scaled(t.g.word_softmax ? 0 : t.R * t.D),
        products(t.g.gram ? t.R * t.R : 0),
        packed(t.g.gram ? panels_size(t.R, t.R) : 0),
        norms(t.R),
        factors(t.R) {
    rows = panels_of(across.data(), t.D), gram = panels_of(packed.data(), t.R);
  }

  // takes picture i, its columns into `along`
  void take(int64_t i, E* along) {
    unit = t.picture(i);
    float* norm = norms.data();
    squares(unit, t.D, norm, t.R);
    longest = t.g.word_softmax ? *std::max_element(norm, norm + t.R) : 1;
    if (!t.g.word_softmax) {
      for (int64_t r = 0; r < t.R; ++r) {
        norm[r] = norm[r] < static_cast<float>(kEps) ? 1e-6f : std::sqrt(norm[r]);
        factors.data()[r] = 1 / norm[r];
      }
      scale_rows(unit, factors.data(), t.R, t.D, scaled.data());
      unit = scaled.data();
    }
    columns = panels_of(along, t.width);
    pack_columns(rows, unit, t.R, t.D, 1);
    pack_rows(columns, unit, t.R, t.D, t.D, 0, 1);
  }

  void multiply_gram() {
    const int64_t R = t.R, D = t.D;
    float* to = products.data();
    for (int64_t j = 0; j < R; j += kPanel)
      multiply(rows, unit + j * D, D, R - j, j, std::min(kPanel, R - j), to + j * R + j, R);
    mirror(R, to);
    pack_rows(gram, to, R, R, R, 0, 1);
  }
};

}  // namespace
}  // namespace fastxm
