// Region-word scores on a GPU, over device addresses and on a stream. Formula:
// fastxm/ops/region_word.py.
#pragma once

#include <cstdint>

namespace fastxm {

// the passes of cpu/region_word.h over the blocks of some pictures; of K words those from
// starts[texts] on are of no text, and what stands for them is left as it is
void region_word_attention_cuda(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                                std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                                std::int64_t pictures, std::int64_t words, std::int64_t regions,
                                double sharp, bool word_softmax, std::uintptr_t stream);
void region_word_pool_cuda(bool float64, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                           std::uintptr_t w, std::uintptr_t dots, std::uintptr_t word_rnorm,
                           std::uintptr_t square, std::uintptr_t starts, std::int64_t texts,
                           std::int64_t pictures, std::int64_t words, double pool,
                           std::uintptr_t scores, std::int64_t stride, std::uintptr_t stream);
void region_word_bwd_cuda(bool float64, std::uintptr_t s, std::uintptr_t ds, std::uintptr_t alpha,
                          std::uintptr_t h, std::uintptr_t twice, std::uintptr_t dots,
                          std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                          std::int64_t texts, std::int64_t pictures, std::int64_t words,
                          std::int64_t regions, double sharp, double pool, bool word_softmax,
                          std::uintptr_t dscores, std::int64_t stride, std::uintptr_t radial,
                          std::uintptr_t stream);

}  // namespace fastxm
