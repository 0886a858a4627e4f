// Region-word scores in tiles of some words and one picture: the products and all that stands
// between them, while a tile is hot in the cache.
#pragma once

#include <algorithm>

#include "cpu/region_word_panels.h"

namespace fastxm {
namespace {

constexpr float kShort = 4096;  // how much a context's squared norm may be below the regions'

// What one thread needs for a chunk of words and a picture.
template <class E>
struct Tile {
  const Texts<E>& t;
  const float sharp;
  Lines<float> room;
  Lines<E> rounded;
  float *s, *alpha, *h, *ds, *wide, *dots, *square, *dsquare, *scratch;
  E *context, *weights, *scaled;  // weights: alpha (later ds) as a factor of products

  Tile(const Texts<E>& texts, float sharpness)
      : t(texts),
        sharp(sharpness),
        room(t.most * (3 * t.R + t.D + 3) + std::max(t.longest, 2 * t.R) +
             gradient_scratch(t.longest, t.R, t.g.word_softmax)),
        rounded(t.most * (t.width + 2 * t.D)) {
    float* at = room.data();
    auto take = [&](int64_t n) { return (at += n) - n; };
    take(t.most * t.R);  // for s
    alpha = take(t.most * t.R), ds = take(t.most * t.R);
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

  // alpha (also as a factor, which is returned), dots, h or the contexts, and the contexts'
  // squares; `again` for the backward
  const E* attention(const Picture<E>& p, const Chunk& c, int64_t picture, bool again) {
    const int64_t row = picture * t.K + c.word;
    const bool kept = picture < t.g.kept, make = !(again && kept);
    s = kept ? pointer<float>(t.g.s) + row * t.R : room.data();
    if (make) multiply_rows(p.rows, t.words(c.word), t.D, c.words, t.R, s);
    for_each_text(c, [&](int64_t, int64_t k, int64_t n) {
      attend(s + k * t.R, alpha + k * t.R, dots + k, n, t.R, sharp, t.g.word_softmax, scratch);
    });
    const E* by = factor(alpha, c.words, weights);
    if (t.g.gram) {
      h = kept ? pointer<float>(t.g.inner) + row * t.R : ds;
      if (make) multiply_rows(p.gram, by, t.R, c.words, t.R, h);
      product_rows(alpha, h, t.R, square, c.words);
      // contexts much shorter than the regions have lost their digits in h, and are made after all
      const auto is_short = [&](float of) { return of < p.longest / kShort; };
      if (make && std::any_of(square, square + c.words, is_short)) {
        multiply_rows(p.columns, by, t.R, c.words, t.D, wide);
        multiply_rows(p.rows, wide, t.D, c.words, t.R, h);
        product_rows(alpha, h, t.R, square, c.words);
      }
      return by;
    }
    h = ds, context = kept ? pointer<E>(t.g.inner) + row * t.D : rounded.data();
    if (make) {
      if constexpr (sizeof(E) == 4) {
        multiply_rows(p.columns, by, t.width, c.words, t.D, context);
      } else {
        multiply_rows(p.columns, by, t.width, c.words, t.D, wide);
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

// Pictures beside each other, and where they are fewer than threads, parts of all words too.
template <class E>
void tiles_fwd(const RegionWordGiven& g, float sharp, float pool, float* scores, int64_t stride,
               int threads) {
  const Texts<E> t(g);
  const float* rnorm = pointer<const float>(g.word_rnorm);
  const int64_t chunks = t.chunks.size();
  const int64_t parts = std::clamp<int64_t>(threads / std::max<int64_t>(1, g.pictures), 1, chunks);
  prefer_large_pages(pointer<void>(g.s), g.kept * t.K * t.R * sizeof(float));
  prefer_large_pages(pointer<void>(g.inner), g.kept * t.K * (g.gram ? t.R : t.D) * sizeof(E));
#pragma omp parallel num_threads(threads)
  {
    Picture<E> picture(t);
    Tile<E> tile(t, sharp);
    Lines<E> along(panels_size(t.D, t.width));
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < g.pictures; ++i)
      for (int64_t part = 0; part < parts; ++part) {
        picture.take(i, along.data());
        if (g.gram) picture.multiply_gram();
        for (int64_t at = part * chunks / parts; at < (part + 1) * chunks / parts; ++at) {
          const Chunk& c = t.chunks[at];
          tile.attention(picture, c, i, false);
          tile.for_each_text(c, [&](int64_t text, int64_t k, int64_t n) {
            scores[text * stride + i] =
                pooled(tile.dots + k, rnorm + c.word + k, tile.square + k, n, pool, tile.scratch);
          });
        }
      }
  }
}

}  // namespace
}  // namespace fastxm
