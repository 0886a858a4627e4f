// Gradients of region-word scores in tiles: of some words and one picture, which are added up over
// the picture's words by one thread, and of some words and a block of pictures, in their order: so
// no sum depends on the threads.
#pragma once

#include <algorithm>

#include "cpu/region_word_tiles.h"

namespace fastxm {
namespace {

// What the words' gradients take of a block of pictures.
template <class E>
struct Block {
  const Texts<E>& t;
  int64_t first = 0;
  Lines<E> along, ds;   // [block] panels of the pictures' columns; [block, K, width] or 0
  Lines<float> radial;  // [block, K]

  Block(const Texts<E>& texts, bool of_words)
      : t(texts),
        along(t.g.block * panels_size(t.D, t.width)),
        ds(of_words ? t.g.block * t.K * t.width : 0),
        radial(t.g.block * t.K) {}

  E* columns(int64_t at) const { return along.data() + at * panels_size(t.D, t.width); }

  // of `count` words from k on
  void add_words(int64_t k, int64_t count, int64_t pictures, float* dwords) const {
    for (int64_t at = 0; at < pictures; ++at) {
      multiply_rows(panels_of(columns(at), t.width), ds.data() + (at * t.K + k) * t.width, t.width,
                    count, t.D, dwords + k * t.D, true);
      add_rows(dwords + k * t.D, radial.data() + at * t.K + k, t.words(k), count, t.D);
    }
  }
};

// A thread's own: the gradient of one picture's regions, and the factors of what some chunks of
// words give to it.
template <class E>
struct Gradients {
  const Texts<E>& t;
  Picture<E> picture;
  Tile<E> tile;
  Lines<E> ds, alpha, more;      // [R, depth], and panels of 2 d|c|^2 alpha or contexts
  Lines<float> gradient, dgram;  // [R, D]; with gram [R, R], sum 2 d|c|^2 alpha alpha^T
  const E* words;                // panels of all

  Gradients(const Texts<E>& texts, const E* all_words, float sharp)
      : t(texts),
        picture(t),
        tile(t, sharp),
        ds(t.R * t.depth),
        alpha(t.R * t.depth),
        more(panels_size(t.g.gram ? t.R : t.D, t.depth)),
        gradient(t.R * t.D),
        dgram(t.g.gram ? t.R * t.R : 0),
        words(all_words) {}

  // the picture at `at` of the block; writes its gradient
  void differentiate_picture(const Block<E>& block, int64_t at, float pool, const float* dscores,
                             int64_t stride, E* dregions) {
    const int64_t i = block.first + at, R = t.R, D = t.D;
    picture.take(i, block.columns(at));
    if (t.g.gram && i >= t.g.kept) picture.multiply_gram();
    for (const Chunk& c : t.chunks) {
      E* own = block.ds.data() ? block.ds.data() + (at * t.K + c.word) * t.width : nullptr;
      float* radial = block.radial.data() + at * t.K + c.word;
      differentiate_tile(c, i, pool, dscores, stride, own, radial);
      if (c.last) add_products(c);
    }
    if (t.g.gram) {
      mirror(R, dgram.data());
      multiply(picture.columns, dgram.data(), R, R, 0, D, gradient.data(), D, true);
    }
    E* to = dregions + i * R * D;
    if (t.g.word_softmax)
      round_rows(gradient.data(), R, D, to, D);
    else
      through_norms(gradient.data(), t.picture(i), picture.norms.data(), R, D, to);
  }

 private:
  // own: where the words' gradients take ds from, or 0
  void differentiate_tile(const Chunk& c, int64_t i, float pool, const float* dscores,
                          int64_t stride, E* own, float* radial) {
    const int64_t R = t.R, D = t.D;
    const float* rnorm = pointer<const float>(t.g.word_rnorm) + c.word;
    const Panels to = panels_of(more.data(), t.depth);
    const E* by = tile.attention(picture, c, i, true);
    turn(by, c.words, R, t.width, alpha.data() + c.own, t.depth);
    if (!t.g.gram) multiply_rows(picture.rows, tile.context, D, c.words, R, tile.h);
    float* of_s = tile.ds;
    if constexpr (sizeof(E) == 4)
      if (own) of_s = own;
    tile.for_each_text(c, [&](int64_t text, int64_t k, int64_t n) {
      float* none = nullptr;
      differentiate(tile.s + k * R, of_s + k * R, tile.alpha + k * R, tile.h + k * R, none,
                    tile.dots + k, rnorm + k, tile.square + k, n, R, tile.sharp, pool,
                    t.g.word_softmax, dscores[text * stride + i], radial + k, tile.dsquare + k,
                    tile.scratch);
    });
    for (int64_t k = 0; k < c.words; ++k) tile.dsquare[k] *= 2;
    if (t.g.gram) {
      scale_rows(tile.alpha, tile.dsquare, c.words, R, tile.alpha);
      pack_rows(to, tile.alpha, c.words, R, R, c.own, 1);
    } else {
      scale_rows(tile.context, tile.dsquare, c.words, D, tile.scaled);
      pack_rows(to, tile.scaled, c.words, D, D, c.own, 1);
    }
    by = tile.factor(of_s, c.words, own ? own : tile.weights);
    turn(by, c.words, R, t.width, ds.data() + c.own, t.depth);
  }

  // what the words of c and the chunks of the same product give to the regions
  void add_products(const Chunk& c) {
    const int64_t R = t.R, D = t.D, depth = c.own + round_up(c.words, kStep<E>);
    const bool add = c.first > 0;
    const Panels some = panels_of(words + c.first * kPanel, depth, t.places);
    const Panels by = panels_of(more.data(), depth, t.depth);
    multiply(some, ds.data(), t.depth, R, 0, D, gradient.data(), D, add);
    if (!t.g.gram) multiply(by, alpha.data(), t.depth, R, 0, D, gradient.data(), D, true);
    for (int64_t j = 0; t.g.gram && j < R; j += kPanel)
      multiply(by, alpha.data() + j * t.depth, t.depth, R - j, j, std::min(kPanel, R - j),
               dgram.data() + j * R + j, R, add);
  }
};

template <class E>
void tiles_bwd(const RegionWordGiven& g, float sharp, float pool, const float* dscores,
               int64_t stride, E* dregions, float* dwords, int threads) {
  const Texts<E> t(g);
  const Lines<E> words(panels_size(t.D, t.places));
  for (const Chunk& c : t.chunks)
    pack_rows(panels_of(words.data(), t.places), t.words(c.word), c.words, t.D, t.D, c.place, 1);
  Block<E> block(t, dwords != nullptr);
  const int64_t some = std::clamp(round_up(t.K / (2 * threads), kTileRows), kWords / 2, 2 * kWords);
#pragma omp parallel num_threads(threads)
  {
    Gradients<E> own(t, words.data(), sharp);
    for (int64_t first = 0; first < g.pictures; first += g.block) {
      const int64_t count = std::min(g.block, g.pictures - first);
#pragma omp single
      block.first = first;
#pragma omp for schedule(dynamic)
      for (int64_t at = 0; at < count; ++at)
        own.differentiate_picture(block, at, pool, dscores, stride, dregions);
#pragma omp for schedule(dynamic)
      for (int64_t k = 0; k < t.K; k += some)
        if (dwords) block.add_words(k, std::min(some, t.K - k), count, dwords);
    }
  }
}

}  // namespace
}  // namespace fastxm
