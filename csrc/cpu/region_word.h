// Region-word scores on the CPU: what is done to the [K, R] blocks of P pictures, which stand one
// after the other, where text t has words starts[t] .. starts[t + 1] - 1 of K. Formula:
// fastxm/ops/region_word.py; the blocks: region_word_blocks.py there.
#pragma once

#include <array>
#include <cstdint>

namespace fastxm {

// s [P, K, R]: dot products. Writes alpha [P, K, R] and dots [P, K], the products of word and
// context.
void region_word_attention_cpu(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                               std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                               std::int64_t pictures, std::int64_t words, std::int64_t regions,
                               double sharp, bool word_softmax, int threads);

// a, b [P, K, n]: rows whose products are the squared norms of the contexts, written to square
// [P, K]; word_rnorm (1 / |w|) [K]. Where a are the contexts and w [K, n] the words, writes dots
// [P, K] too, of the very contexts that |c|^2 is of; where w is 0, dots are attention's. Unless
// scores is 0, writes scores [texts, P], `stride` from text to text.
void region_word_pool_cpu(bool float64, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                          std::uintptr_t w, std::uintptr_t dots, std::uintptr_t word_rnorm,
                          std::uintptr_t square, std::uintptr_t starts, std::int64_t texts,
                          std::int64_t pictures, std::int64_t words, double pool,
                          std::uintptr_t scores, std::int64_t stride, int threads);

// Writes ds, which may be s; twice = 2 alpha d|c|^2, which may be h; and radial [P, K], what each
// word's own norm gives: dw = ... + radial w. dscores [texts, P], `stride` from text to text.
void region_word_bwd_cpu(bool float64, std::uintptr_t s, std::uintptr_t ds, std::uintptr_t alpha,
                         std::uintptr_t h, std::uintptr_t twice, std::uintptr_t dots,
                         std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                         std::int64_t texts, std::int64_t pictures, std::int64_t words,
                         std::int64_t regions, double sharp, double pool, bool word_softmax,
                         std::uintptr_t dscores, std::int64_t stride, std::uintptr_t radial,
                         int threads);

// What the tiles take, of float or of bfloat16 (`bf16`, depth even): x [pictures, regions, depth],
// words [words, depth], word_rnorm [words] (float), starts [texts + 1] (int64). Of the first `kept`
// pictures s [pictures, words, regions] (float) is kept between forward and backward, and `inner`,
// the contexts [pictures, words, depth], or with `gram`, which is of float, h [pictures, words,
// regions]. The backward takes `block` pictures before it adds up what they give to the words.
struct RegionWordGiven {
  std::int64_t bf16, pictures, regions, depth, texts, words, word_softmax, gram, block, kept;
  std::uintptr_t x, w, word_rnorm, starts, s, inner;
};

using RegionWordNumbers = std::array<std::uint64_t, 16>;

// Where gemm_level() has the dtype: products and all else of some words and a picture in one tile.
// Writes scores [texts, pictures], float, `stride` from text to text.
void region_word_tiles_fwd_cpu(const RegionWordNumbers& given, double sharp, double pool,
                               std::uintptr_t scores, std::int64_t stride, int threads);

// Writes dregions, of x's dtype, and adds to dwords [words, depth], float, unless that is 0.
void region_word_tiles_bwd_cpu(const RegionWordNumbers& given, double sharp, double pool,
                               std::uintptr_t dscores, std::int64_t stride, std::uintptr_t dregions,
                               std::uintptr_t dwords, int threads);

}  // namespace fastxm
