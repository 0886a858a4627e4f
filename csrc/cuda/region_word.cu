// Region-word scores by CUDA: what is done to blocks of products. A block of threads owns a text on
// a picture; its warps take a word each, or its threads a region each. Formula:
// fastxm/ops/region_word.py.
#include "region_word.h"

#include "common.cuh"

namespace fastxm {
namespace {

using std::int64_t;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr double kEps = 1e-12;  // of squared norms, as in the formula

struct Texts {
  const int64_t* starts;
  int64_t texts, pictures, words;  // words: places in a block
};

// a text on a picture: its first place in the blocks [P, K] and among the words, and its words
struct Place {
  int64_t text, picture, first, word;
  int words;
};

__device__ __forceinline__ Place place_of(const Texts& e) {
  const int64_t text = blockIdx.x % e.texts, picture = blockIdx.x / e.texts;
  const int64_t word = e.starts[text];
  return {text, picture, picture * e.words + word, word, int(e.starts[text + 1] - word)};
}

// the softmax of a column of s over n words: its maximum, and 1 / the sum of exponentials
template <class T>
struct Column {
  T top, scale;
  __device__ __forceinline__ Column(const T* s, int n, int64_t stride) : top(-T(INFINITY)) {
    for (int j = 0; j < n; ++j) top = s[j * stride] > top ? s[j * stride] : top;
    T total = 0;
    for (int j = 0; j < n; ++j) total += exp_fast(s[j * stride] - top);
    scale = 1 / total;
  }
  __device__ __forceinline__ T operator()(T s) const { return exp_fast(s - top) * scale; }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const T* s, T* alpha, T* dots, const Texts e, int64_t R, T sharp,
                     bool word_softmax) {
  const Place p = place_of(e);
  s += p.first * R;
  alpha += p.first * R;
  if (word_softmax) {  // alpha becomes beta first
    for (int64_t r = threadIdx.x; r < R; r += kThreads) {
      const Column<T> beta(s + r, p.words, R);
      for (int j = 0; j < p.words; ++j) alpha[j * R + r] = beta(s[j * R + r]);
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < p.words; j += kWarps) {
    const T* own = s + j * R;
    T* row = alpha + j * R;
    const T* beta = word_softmax ? row : own;
    T top = -T(INFINITY), total = 0, dot = 0;
    for (int64_t r = lane; r < R; r += 32) top = sharp * beta[r] > top ? sharp * beta[r] : top;
    top = warp_max(top);
    for (int64_t r = lane; r < R; r += 32) {
      const T x = exp_fast(sharp * beta[r] - top);
      total += x;
      dot += x * own[r];
    }
    const T scale = 1 / warp_sum(total);
    dot = warp_sum(dot) * scale;
    for (int64_t r = lane; r < R; r += 32) row[r] = exp_fast(sharp * beta[r] - top) * scale;
    if (lane == 0) dots[p.first + j] = dot;
  }
}

// the cosines m of a text's words, and exp(pool m) as far as `best` and `total` of all say
template <class T>
struct Pool {
  const T *dots, *word_rnorm, *square;
  T sharpness, best, total, scale;

  // by all lanes of a warp
  __device__ __forceinline__ Pool(const T* dots_, const T* word_rnorm_, const T* square_, int words,
                                  T sharpness_)
      : dots(dots_),
        word_rnorm(word_rnorm_),
        square(square_),
        sharpness(sharpness_),
        best(-T(INFINITY)),
        total(0) {
    const int lane = threadIdx.x % 32;
    for (int j = lane; j < words; j += 32) best = logit(j) > best ? logit(j) : best;
    best = warp_max(best);
    for (int j = lane; j < words; j += 32) total += exp(logit(j) - best);
    total = warp_sum(total);
    scale = 1 / total;
  }
  __device__ __forceinline__ T rnorm(int j) const {
    return 1 / sqrt(square[j] > T(kEps) || square[j] != square[j] ? square[j] : T(kEps));
  }
  __device__ __forceinline__ T cosine(int j) const { return dots[j] * word_rnorm[j] * rnorm(j); }
  __device__ __forceinline__ T logit(int j) const { return sharpness * cosine(j); }
  __device__ __forceinline__ T weight(int j) const { return exp(logit(j) - best) * scale; }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const T* a, const T* b, int64_t n, const T* w, T* dots, const T* word_rnorm,
                T* square, const Texts e, T sharpness, T* scores, int64_t stride) {
  const Place p = place_of(e);
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < p.words; j += kWarps) {
    const int64_t row = (p.first + j) * n;
    T sum = 0;
    for (int64_t i = lane; i < n; i += 32) sum += a[row + i] * b[row + i];
    sum = warp_sum(sum);
    if (lane == 0) square[p.first + j] = sum;
    if (!w) continue;
    T dot = 0;
    for (int64_t i = lane; i < n; i += 32) dot += a[row + i] * w[(p.word + j) * n + i];
    dot = warp_sum(dot);
    if (lane == 0) dots[p.first + j] = dot;
  }
  if (!scores) return;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const Pool<T> pool(dots + p.first, word_rnorm + p.word, square + p.first, p.words, sharpness);
  if (lane == 0)
    scores[p.text * stride + p.picture] =
        p.words ? (pool.best + log(pool.total)) / sharpness : -T(INFINITY);
}

// of a word: the gradients of <w, c> and |c|^2, and of its own norm
template <class T>
struct Terms {
  T ddot, dsquare, radial;
  __device__ __forceinline__ Terms(const Pool<T>& pool, T dscore, int j) {
    const T rnorm = pool.rnorm(j), m = pool.cosine(j), dm = dscore * pool.weight(j);
    ddot = dm * pool.word_rnorm[j] * rnorm;
    dsquare = pool.square[j] > T(kEps) ? -dm * m * rnorm * rnorm / 2 : T(0);
    radial = -dm * m * pool.word_rnorm[j] * pool.word_rnorm[j];
  }
};

template <class T>
struct Blocks {
  const T *s, *alpha, *h;
  T *ds, *twice;  // may be s and h
};

template <class T, bool kWordSoftmax>
__global__ void __launch_bounds__(kThreads)
    bwd_kernel(const Blocks<T> blocks, const T* dots, const T* word_rnorm, const T* square,
               const Texts e, int64_t R, T sharp, T sharpness, const T* dscores, int64_t stride,
               T* radial) {
  const Place p = place_of(e);
  const T dscore = dscores[p.text * stride + p.picture];
  const Pool<T> pool(dots + p.first, word_rnorm + p.word, square + p.first, p.words, sharpness);
  const int lane = threadIdx.x % 32;
  const int64_t start = p.first * R;
  const T *s = blocks.s + start, *alpha = blocks.alpha + start, *h = blocks.h + start;
  T *ds = blocks.ds + start, *twice = blocks.twice + start;
  for (int j = threadIdx.x / 32; j < p.words; j += kWarps) {
    const Terms<T> of(pool, dscore, j);
    // sum_r alpha (ddot s + 2 dsquare h)
    const T inner = of.ddot * pool.dots[j] + 2 * of.dsquare * pool.square[j];
    for (int64_t r = lane; r < R; r += 32) {
      const int64_t i = j * R + r;
      const T g = sharp * alpha[i] * (of.ddot * s[i] + 2 * of.dsquare * h[i] - inner);
      // what has the softmax over words before it waits in the place of twice
      twice[i] = kWordSoftmax ? g : 2 * of.dsquare * alpha[i];
      if (!kWordSoftmax) ds[i] = of.ddot * alpha[i] + g;
    }
    if (lane == 0) radial[p.first + j] = of.radial;
  }
  if (!kWordSoftmax) return;
  __syncthreads();
  for (int64_t r = threadIdx.x; r < R; r += kThreads) {
    const Column<T> beta(s + r, p.words, R);
    T inner = 0;
    for (int j = 0; j < p.words; ++j) inner += beta(s[j * R + r]) * twice[j * R + r];
    for (int j = 0; j < p.words; ++j) {
      const int64_t i = j * R + r;
      const Terms<T> of(pool, dscore, j);
      ds[i] = of.ddot * alpha[i] + beta(s[i]) * (twice[i] - inner);
      twice[i] = 2 * of.dsquare * alpha[i];
    }
  }
}

Texts texts_of(std::uintptr_t starts, int64_t texts, int64_t pictures, int64_t words) {
  return {pointer<const int64_t>(starts), texts, pictures, words};
}

}  // namespace

void region_word_attention_cuda(bool float64, std::uintptr_t s, std::uintptr_t alpha,
                                std::uintptr_t dots, std::uintptr_t starts, std::int64_t texts,
                                std::int64_t pictures, std::int64_t words, std::int64_t regions,
                                double sharp, bool word_softmax, std::uintptr_t stream) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    launch("region_word_attention", attention_kernel<T>, texts * pictures, kThreads,
           reinterpret_cast<cudaStream_t>(stream), pointer<const T>(s), pointer<T>(alpha),
           pointer<T>(dots), texts_of(starts, texts, pictures, words), regions,
           static_cast<T>(sharp), word_softmax);
  };
  float64 ? run(double()) : run(float());
}

void region_word_pool_cuda(bool float64, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                           std::uintptr_t w, std::uintptr_t dots, std::uintptr_t word_rnorm,
                           std::uintptr_t square, std::uintptr_t starts, std::int64_t texts,
                           std::int64_t pictures, std::int64_t words, double pool,
                           std::uintptr_t scores, std::int64_t stride, std::uintptr_t stream) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    launch("region_word_pool", pool_kernel<T>, texts * pictures, kThreads,
           reinterpret_cast<cudaStream_t>(stream), pointer<const T>(a), pointer<const T>(b), n,
           pointer<const T>(w), pointer<T>(dots), pointer<const T>(word_rnorm), pointer<T>(square),
           texts_of(starts, texts, pictures, words), static_cast<T>(pool), pointer<T>(scores),
           stride);
  };
  float64 ? run(double()) : run(float());
}

void region_word_bwd_cuda(bool float64, std::uintptr_t s, std::uintptr_t ds, std::uintptr_t alpha,
                          std::uintptr_t h, std::uintptr_t twice, std::uintptr_t dots,
                          std::uintptr_t word_rnorm, std::uintptr_t square, std::uintptr_t starts,
                          std::int64_t texts, std::int64_t pictures, std::int64_t words,
                          std::int64_t regions, double sharp, double pool, bool word_softmax,
                          std::uintptr_t dscores, std::int64_t stride, std::uintptr_t radial,
                          std::uintptr_t stream) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    const Blocks<T> blocks = {pointer<const T>(s), pointer<const T>(alpha), pointer<const T>(h),
                              pointer<T>(ds), pointer<T>(twice)};
    launch("region_word_bwd", word_softmax ? bwd_kernel<T, true> : bwd_kernel<T, false>,
           texts * pictures, kThreads, reinterpret_cast<cudaStream_t>(stream), blocks,
           pointer<const T>(dots), pointer<const T>(word_rnorm), pointer<const T>(square),
           texts_of(starts, texts, pictures, words), regions, static_cast<T>(sharp),
           static_cast<T>(pool), pointer<const T>(dscores), stride, pointer<T>(radial));
  };
  float64 ? run(double()) : run(float());
}

}  // namespace fastxm
