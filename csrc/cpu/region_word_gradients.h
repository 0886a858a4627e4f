// Gradients of region-word scores in tiles: of some words and one picture, then of all words and
// some regions, then of some words and a block of pictures, so that no sum depends on the threads.
#pragma once

#include <algorithm>

#include "cpu/region_word_tiles.h"

namespace fastxm {
namespace {

// What the products of the gradients take of all words and a block of pictures.
template <class E>
struct Gradients {
  Tiles<E>& t;
  Lines<E> words;                // panels of the words
  Lines<E> ds, alpha, contexts;  // [block] panels, of the regions, and of contexts times 2 d|c|^2
  Lines<E> rows;                 // [block, K, width] ds, if words get a gradient
  Lines<float> radial;           // [block, K]

  Gradients(Tiles<E>& tiles, bool of_words)
      : t(tiles),
        words(panels_size(t.D, t.places)),
        ds(t.g.block * panels_size(t.R, t.places)),
        alpha(t.g.block * panels_size(t.R, t.places)),
        contexts(t.g.block * panels_size(t.D, t.places)),
        rows(of_words ? t.g.block * t.K * t.width : 0),
        radial(t.g.block * t.K) {
    for (const Chunk& c : t.chunks)
      pack_rows(t.panels(words, t.D, t.places, 0), t.words(c.word), c.words, t.D, t.D, c.place, 1);
  }

  void differentiate_tile(Tile<E>& tile, const Chunk& c, int64_t first, int64_t at,
                          const float* dscores, int64_t stride, bool of_words) {
    const int64_t R = t.R, D = t.D;
    const float* rnorm = pointer<const float>(t.g.word_rnorm) + c.word;
    const E* by = tile.attention(c, first + at, at, true);
    pack_rows(t.panels(alpha, R, t.places, at), by, c.words, R, t.width, c.place, 1);
    t.multiply_rows(t.rows(at), tile.context, D, c.words, R, tile.h);
    float* own = radial.data() + at * t.K + c.word;
    tile.for_each_text(c, [&](int64_t text, int64_t k, int64_t n) {
      float* none = nullptr;
      differentiate(tile.s + k * R, tile.h + k * R, tile.alpha + k * R, tile.h + k * R, none,
                    tile.dots + k, rnorm + k, tile.square + k, n, R, t.sharp, t.pool,
                    t.g.word_softmax, dscores[text * stride + first + at], own + k,
                    tile.dsquare + k, tile.scratch);
    });
    for (int64_t k = 0; k < c.words; ++k) tile.dsquare[k] *= 2;
    scale_rows(tile.context, tile.dsquare, c.words, D, tile.scaled);
    pack_rows(t.panels(contexts, D, t.places, at), tile.scaled, c.words, D, D, c.place, 1);
    E* to = of_words ? rows.data() + (at * t.K + c.word) * t.width : tile.weights;
    by = tile.factor(tile.h, c.words, to);
    if (of_words && by != to) std::copy_n(by, c.words * t.width, to);
    pack_rows(t.panels(ds, R, t.places, at), by, c.words, R, t.width, c.place, 1);
  }

  // of the regions from r on, one panel of them; out [kPanel, D] is scratch
  void to_regions(int64_t r, int64_t first, int64_t at, float* out, E* dregions) const {
    const int64_t count = std::min(kPanel, t.R - r), D = t.D, step = 4 * kPanel;
    const Panels d = t.panels(ds, t.R, t.places, at), a = t.panels(alpha, t.R, t.places, at);
    auto left = [&](const Panels& p) { return Left{pointer<E>(p.data) + r * t.places, 4, step}; };
    multiply(t.panels(words, D, t.places, 0), left(d), count, 0, D, out, D);
    multiply(t.panels(contexts, D, t.places, at), left(a), count, 0, D, out, D, true);
    const int64_t to = ((first + at) * t.R + r) * D;
    if (t.g.word_softmax)
      round_rows(out, count, D, dregions + to, D);
    else
      through_norms(out, t.picture(first + at) + r * D, t.norms.data() + at * t.R + r, count, D,
                    dregions + to);
  }

  // of the words from k on, at most kWords
  void to_words(int64_t k, int64_t pictures, float* dwords) const {
    const int64_t count = std::min(kWords, t.K - k);
    for (int64_t at = 0; at < pictures; ++at) {
      t.multiply_rows(t.columns(at), rows.data() + (at * t.K + k) * t.width, t.width, count, t.D,
                      dwords + k * t.D, true);
      add_rows(dwords + k * t.D, radial.data() + at * t.K + k, t.words(k), count, t.D);
    }
  }
};

template <class E>
void tiles_bwd(const RegionWordGiven& g, float sharp, float pool, const float* dscores,
               int64_t stride, E* dregions, float* dwords, int threads) {
  Tiles<E> t(g, sharp, pool, threads);
  Gradients<E> gradients(t, dwords != nullptr);
  for (int64_t first = 0; first < g.pictures; first += g.block) {
    const int64_t count = std::min(g.block, g.pictures - first);
    for_each_tile(t, first, count, [&](Tile<E>& tile, const Chunk& c, int64_t at) {
      gradients.differentiate_tile(tile, c, first, at, dscores, stride, dwords != nullptr);
    });
#pragma omp parallel num_threads(threads)
    {
      Lines<float> out(kPanel * t.D);
#pragma omp for collapse(2)
      for (int64_t at = 0; at < count; ++at)
        for (int64_t r = 0; r < t.R; r += kPanel)
          gradients.to_regions(r, first, at, out.data(), dregions);
#pragma omp for
      for (int64_t k = 0; k < t.K; k += kWords)
        if (dwords) gradients.to_words(k, count, dwords);
    }
  }
}

}  // namespace
}  // namespace fastxm
