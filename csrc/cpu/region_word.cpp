#include "cpu/region_word.h"

#include <algorithm>
#include <memory>

#include "cpu/region_word_gradients.h"
#include "cpu/region_word_rows.h"
#include "cpu/region_word_tiles.h"
#include "cpu/simd.h"
#include "numbers.h"

namespace fastxm {
namespace {

constexpr std::int64_t kSmall = 1 << 14;  // entries below which threads cost more than they give

// texts of several pictures, whose blocks stand one after the other
struct Extent {
  const std::int64_t* starts;
  std::int64_t texts, pictures, words;
};

std::int64_t longest(const Extent& e) {
  std::int64_t n = 0;
  for (std::int64_t t = 0; t < e.texts; ++t) n = std::max(n, e.starts[t + 1] - e.starts[t]);
  return n;
}

// f(text, picture, the first of its words in the blocks [pictures, words], their number, scratch)
// where a row of a block has `row` entries
template <class T, class F>
void for_each_text(const Extent& e, std::int64_t row, std::int64_t scratch, int threads, F f) {
  if (e.pictures * e.words * row < kSmall) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<T[]> room(new T[scratch]);
#pragma omp for collapse(2)
    for (std::int64_t p = 0; p < e.pictures; ++p)
      for (std::int64_t t = 0; t < e.texts; ++t)
        f(t, p, p * e.words + e.starts[t], e.starts[t + 1] - e.starts[t], room.get());
  }
}

}  // namespace

void region_word_attention_cpu(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                               std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                               std::int64_t pictures, std::int64_t words, std::int64_t regions,
                               double sharp, bool word_softmax, int threads) {
  auto run = [&](auto type) {
    using T = decltype(type);
    Extent e = {pointer<const std::int64_t>(starts), texts, pictures, words};
    auto text = [&](std::int64_t, std::int64_t, std::int64_t k, std::int64_t n, T* scratch) {
      attend(pointer<const T>(s) + k * regions, pointer<T>(alpha) + k * regions,
             pointer<T>(dots) + k, n, regions, static_cast<T>(sharp), word_softmax, scratch);
    };
    for_each_text<T>(e, regions, word_softmax ? 2 * regions : 0, threads, text);
  };
  float64 ? run(double()) : run(float());
}

void region_word_pool_cpu(bool float64, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                          std::uintptr_t w, std::uintptr_t dots, std::uintptr_t word_rnorm,
                          std::uintptr_t square, std::uintptr_t starts, std::int64_t texts,
                          std::int64_t pictures, std::int64_t words, double pool,
                          std::uintptr_t scores, std::int64_t stride, int threads) {
  auto run = [&](auto type) {
    using T = decltype(type);
    Extent e = {pointer<const std::int64_t>(starts), texts, pictures, words};
    auto text = [&](std::int64_t t, std::int64_t p, std::int64_t k, std::int64_t m, T* scratch) {
      const T* rows = pointer<const T>(a) + k * n;
      T* squares = pointer<T>(square) + k;
      product_rows(rows, pointer<const T>(b) + k * n, n, squares, m);
      if (w) product_rows(rows, pointer<const T>(w) + e.starts[t] * n, n, pointer<T>(dots) + k, m);
      if (!scores) return;
      pointer<T>(scores)[t * stride + p] =
          pooled(pointer<const T>(dots) + k, pointer<const T>(word_rnorm) + e.starts[t], squares, m,
                 static_cast<T>(pool), scratch);
    };
    for_each_text<T>(e, n, longest(e), threads, text);
  };
  float64 ? run(double()) : run(float());
}

void region_word_bwd_cpu(bool float64, std::uintptr_t s, std::uintptr_t ds, std::uintptr_t alpha,
                         std::uintptr_t h, std::uintptr_t twice, std::uintptr_t dots,
                         std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                         std::int64_t texts, std::int64_t pictures, std::int64_t words,
                         std::int64_t regions, double sharp, double pool, bool word_softmax,
                         std::uintptr_t dscores, std::int64_t stride, std::uintptr_t radial,
                         int threads) {
  auto run = [&](auto type) {
    using T = decltype(type);
    Extent e = {pointer<const std::int64_t>(starts), texts, pictures, words};
    auto text = [&](std::int64_t t, std::int64_t p, std::int64_t k, std::int64_t n, T* scratch) {
      std::int64_t at = k * regions;
      differentiate(pointer<const T>(s) + at, pointer<T>(ds) + at, pointer<const T>(alpha) + at,
                    pointer<const T>(h) + at, pointer<T>(twice) + at, pointer<const T>(dots) + k,
                    pointer<const T>(word_rnorm) + e.starts[t], pointer<const T>(square) + k, n,
                    regions, static_cast<T>(sharp), static_cast<T>(pool), word_softmax,
                    pointer<const T>(dscores)[t * stride + p], pointer<T>(radial) + k,
                    static_cast<T*>(nullptr), scratch);
    };
    std::int64_t scratch = gradient_scratch(longest(e), regions, word_softmax);
    for_each_text<T>(e, regions, scratch, threads, text);
  };
  float64 ? run(double()) : run(float());
}

void region_word_tiles_fwd_cpu(const RegionWordNumbers& numbers, double sharp, double pool,
                               std::uintptr_t scores, std::int64_t stride, int threads) {
  const auto g = struct_of<RegionWordGiven>(numbers);
  auto run = [&](auto element) {
    tiles_fwd<decltype(element)>(g, static_cast<float>(sharp), static_cast<float>(pool),
                                 pointer<float>(scores), stride, threads);
  };
  g.bf16 ? run(bfloat16()) : run(float());
}

void region_word_tiles_bwd_cpu(const RegionWordNumbers& numbers, double sharp, double pool,
                               std::uintptr_t dscores, std::int64_t stride, std::uintptr_t dregions,
                               std::uintptr_t dwords, int threads) {
  const auto g = struct_of<RegionWordGiven>(numbers);
  auto run = [&](auto element) {
    using E = decltype(element);
    tiles_bwd<E>(g, static_cast<float>(sharp), static_cast<float>(pool),
                 pointer<const float>(dscores), stride, pointer<E>(dregions),
                 pointer<float>(dwords), threads);
  };
  g.bf16 ? run(bfloat16()) : run(float());
}

}  // namespace fastxm
