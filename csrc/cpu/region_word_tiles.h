// Region-word scores in tiles of some words and one picture: the products and all that stands
// between them, while a tile is hot in the cache.
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

// whole texts, of at most kWords words if there are several; their words' first place in the
// depth of a product
struct Chunk {
  int64_t text, texts, word, words, place;
};

// All words against a block of pictures.
template <class E>
struct Tiles {
  const RegionWordGiven& g;
  float sharp, pool;
  int threads;
  int64_t K, R, D, width, places = 0, longest = 0, most = 0;  // of a text, of a chunk
  const int64_t* starts;
  std::vector<Chunk> chunks;
  Lines<E> across, along;  // [block] panels of the rows of pictures, and of their columns
  Lines<float> norms;      // [block, R]

  Tiles(const RegionWordGiven& given, float sharpness, float pooling, int n)
      : g(given),
        sharp(sharpness),
        pool(pooling),
        threads(n),
        K(g.words),
        R(g.regions),
        D(g.depth),
        width(round_up(R, kStep<E>)),
        starts(pointer<const int64_t>(g.starts)),
        across(g.block * panels_size(R, D)),
        along(g.block * panels_size(D, width)),
        norms(g.block * R) {
    for (int64_t t = 0; t < g.texts; ++t) {
      const int64_t n = starts[t + 1] - starts[t];
      if (chunks.empty() || chunks.back().words + n > kWords)
        chunks.push_back({t, 0, starts[t], 0, 0});
      chunks.back().texts += 1, chunks.back().words += n;
      longest = std::max(longest, n);
    }
    for (Chunk& c : chunks) {
      c.place = places;
      places += round_up(c.words, kStep<E>);
      most = std::max(most, c.words);
    }
  }

  Panels panels(const Lines<E>& room, int64_t columns, int64_t depth, int64_t at) const {
    const E* data = room.data() + at * panels_size(columns, depth);
    return {sizeof(E) == 2, depth, reinterpret_cast<std::uintptr_t>(data)};
  }
  Panels rows(int64_t at) const { return panels(across, R, D, at); }
  Panels columns(int64_t at) const { return panels(along, D, width, at); }
  const E* picture(int64_t i) const { return pointer<const E>(g.x) + i * R * D; }
  const E* words(int64_t k) const { return pointer<const E>(g.w) + k * D; }

  void multiply_rows(const Panels& by, const E* a, int64_t stride, int64_t n, int64_t columns,
                     float* out, bool add = false) const {
    multiply(by, a, stride, n, 0, columns, out, columns, add);
  }

  // packs the pictures from `first` on
  void prepare(int64_t first, int64_t count) {
#pragma omp parallel num_threads(threads)
    {
      Lines<E> room(R * D);
      Lines<float> scale(R);
#pragma omp for
      for (int64_t at = 0; at < count; ++at) {
        const E* unit = picture(first + at);
        if (!g.word_softmax) {
          float* norm = norms.data() + at * R;
          squares(unit, D, norm, R);
          for (int64_t r = 0; r < R; ++r) {
            norm[r] = norm[r] < static_cast<float>(kEps) ? 1e-6f : std::sqrt(norm[r]);
            scale.data()[r] = 1 / norm[r];
          }
          scale_rows(unit, scale.data(), R, D, room.data());
          unit = room.data();
        }
        pack_columns(rows(at), unit, R, D, 1);
        pack_rows(columns(at), unit, R, D, D, 0, 1);
      }
    }
  }
};

// What one thread needs for a chunk of words and a picture.
template <class E>
struct Tile {
  const Tiles<E>& t;
  Lines<float> room;
  Lines<E> rounded;
  float *s, *alpha, *h, *wide, *dots, *square, *dsquare, *scratch;
  E *weights, *context, *scaled;  // alpha (later ds) as a factor of products

  explicit Tile(const Tiles<E>& tiles)
      : t(tiles),
        room(t.most * (3 * t.R + t.D + 3) + std::max(t.longest, 2 * t.R) +
             gradient_scratch(t.longest, t.R, t.g.word_softmax)),
        rounded(t.most * (t.width + 2 * t.D)) {
    float* at = room.data();
    auto take = [&](int64_t n) { return (at += n) - n; };
    take(t.most * t.R);  // for s
    alpha = take(t.most * t.R), h = take(t.most * t.R);
    wide = take(t.most * t.D);
    dots = take(t.most), square = take(t.most), dsquare = take(t.most), scratch = take(0);
    scaled = rounded.data() + t.most * t.D;  // behind the contexts
    weights = scaled + t.most * t.D;
  }

  // a float tile as a factor of products
  const E* factor(const float* from, int64_t n, E* to) const {
    if constexpr (sizeof(E) == 4) {
      (void)n, (void)to;
      return from;
    } else {
      round_rows(from, n, t.R, to, t.width);
      return to;
    }
  }

  // alpha (also as a factor, which is returned), dots, the contexts and their squares, `again` for
  // the backward
  const E* attention(const Chunk& c, int64_t picture, int64_t at, bool again) {
    const int64_t row = picture * t.K + c.word;
    const bool kept = picture < t.g.kept, make = !(again && kept);
    s = kept ? pointer<float>(t.g.s) + row * t.R : room.data();
    context = kept ? pointer<E>(t.g.contexts) + row * t.D : rounded.data();
    if (make) t.multiply_rows(t.rows(at), t.words(c.word), t.D, c.words, t.R, s);
    for_each_text(c, [&](int64_t text, int64_t k, int64_t n) {
      attend(s + k * t.R, alpha + k * t.R, dots + k, n, t.R, t.sharp, t.g.word_softmax, scratch);
    });
    const E* by = factor(alpha, c.words, weights);
    if (make) {
      if constexpr (sizeof(E) == 4) {
        t.multiply_rows(t.columns(at), by, t.width, c.words, t.D, context);
      } else {
        t.multiply_rows(t.columns(at), by, t.width, c.words, t.D, wide);
        round_rows(wide, c.words, t.D, context, t.D);
      }
    }
    squares(context, t.D, square, c.words);
    return by;
  }

  // f(text, its first word in the chunk, their number)
  template <class F>
  void for_each_text(const Chunk& c, F f) const {
    for (int64_t i = c.text; i < c.text + c.texts; ++i)
      f(i, t.starts[i] - c.word, t.starts[i + 1] - t.starts[i]);
  }
};

// f(tile, chunk, place in the block) for the chunks of the block of pictures from `first` on
template <class E, class F>
void for_each_tile(Tiles<E>& t, int64_t first, int64_t count, F f) {
  const int64_t chunks = t.chunks.size();
  t.prepare(first, count);
#pragma omp parallel num_threads(t.threads)
  {
    Tile<E> tile(t);
#pragma omp for collapse(2)
    for (int64_t at = 0; at < count; ++at)
      for (int64_t i = 0; i < chunks; ++i) f(tile, t.chunks[i], at);
  }
}

template <class E>
void tiles_fwd(const RegionWordGiven& g, float sharp, float pool, float* scores, int64_t stride,
               int threads) {
  Tiles<E> t(g, sharp, pool, threads);
  const float* rnorm = pointer<const float>(g.word_rnorm);
  prefer_large_pages(pointer<void>(g.s), g.kept * t.K * t.R * sizeof(float));
  prefer_large_pages(pointer<void>(g.contexts), g.kept * t.K * t.D * sizeof(E));
  for (int64_t first = 0; first < g.pictures; first += g.block)
    for_each_tile(t, first, std::min(g.block, g.pictures - first),
                  [&](Tile<E>& tile, const Chunk& c, int64_t at) {
                    tile.attention(c, first + at, at, false);
                    tile.for_each_text(c, [&](int64_t text, int64_t k, int64_t n) {
                      scores[text * stride + first + at] =
                          pooled(tile.dots + k, rnorm + c.word + k, tile.square + k, n, pool,
                                 tile.scratch);
                    });
                  });
}

}  // namespace
}  // namespace fastxm
