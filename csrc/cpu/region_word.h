// Region-word scores on the CPU: what is done to the [K, R] blocks of P pictures, which stand one
// after the other, where text t has words starts[t] .. starts[t + 1] - 1 of K. Formula:
// fastxm/ops/region_word.py; the blocks: region_word_blocks.py there.
#pragma once

#include <cstdint>

namespace fastxm {

// s [P, K, R]: dot products. Writes alpha [P, K, R] and dots [P, K], the products of word and
// context.
void region_word_attention_cpu(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                               std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                               std::int64_t pictures, std::int64_t words, std::int64_t regions,
                               double sharp, bool word_softmax, int threads);

// a, b [P, K, n]: rows whose products are the squared norms of the contexts, written to square
// [P, K]; dots [P, K]; word_rnorm (1 / |w|) [K]. Unless it is 0, writes scores [texts, P], `stride`
// from text to text.
void region_word_pool_cpu(bool float64, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                          std::uintptr_t dots, std::uintptr_t word_rnorm, std::uintptr_t square,
                          std::uintptr_t starts, std::int64_t texts, std::int64_t pictures,
                          std::int64_t words, double pool, std::uintptr_t scores,
                          std::int64_t stride, int threads);

// Writes ds, which may be s; twice = 2 alpha d|c|^2, which may be h; and radial [P, K], what each
// word's own norm gives: dw = ... + radial w. dscores [texts, P], `stride` from text to text.
void region_word_bwd_cpu(bool float64, std::uintptr_t s, std::uintptr_t ds, std::uintptr_t alpha,
                         std::uintptr_t h, std::uintptr_t twice, std::uintptr_t dots,
                         std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                         std::int64_t texts, std::int64_t pictures, std::int64_t words,
                         std::int64_t regions, double sharp, double pool, bool word_softmax,
                         std::uintptr_t dscores, std::int64_t stride, std::uintptr_t radial,
                         int threads);

}  // namespace fastxm
