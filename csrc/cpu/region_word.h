// Region-word scores on the CPU: what is done to the [K, R] blocks of one picture, where K counts
// the words of all texts and text t has words starts[t] .. starts[t + 1] - 1. No context vector is
// formed: with G = r rᵀ and h = alpha G, <w, c> = sum alpha s and |c|^2 = sum alpha h.
// Formula: fastxm/ops/region_word.py.
#pragma once

#include <cstdint>

namespace fastxm {

// s [K, R]: dot products. Writes alpha [K, R] and dots [K], the products of word and context.
void region_word_attention_cpu(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                               std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                               std::int64_t regions, double sharp, bool word_softmax, int threads);

// alpha, h [K, R]; dots, word_rnorm (1 / |w|) [K]. Writes square [K], the squared norms of the
// contexts, and scores, one a text, `stride` apart.
void region_word_pool_cpu(bool float64, std::uintptr_t alpha, std::uintptr_t h, std::uintptr_t dots,
                          std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                          std::int64_t texts, std::int64_t regions, double pool,
                          std::uintptr_t scores, std::int64_t stride, int threads);

// Turns s into ds and h into alpha d|c|^2 (a factor a word), and adds to radial [K] what each
// word's own norm gives: dw = ... + radial w. dscores are one a text, `stride` apart.
void region_word_bwd_cpu(bool float64, std::uintptr_t s, std::uintptr_t alpha, std::uintptr_t h,
                         std::uintptr_t dots, std::uintptr_t word_rnorm, std::uintptr_t square,
                         std::uintptr_t starts, std::int64_t texts, std::int64_t regions,
                         double sharp, double pool, bool word_softmax, std::uintptr_t dscores,
                         std::int64_t stride, std::uintptr_t radial, int threads);

}  // namespace fastxm
