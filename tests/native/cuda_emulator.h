// CUDA on the CPU, as far as fastxm's kernels go: so that their own source runs without a GPU.
//
// A block's threads are fibers. They run one after the other from barrier to barrier, in another
// order at every barrier if there is a seed: where a barrier is missing, results change with it. A
// shuffle is a barrier of its warp.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_, unsigned y_ = 1) : x(x_), y(y_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (std::uint64_t(a) * b) >> 32; }

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  if (std::isnan(x)) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

namespace emulator {

inline std::uint64_t seed = 0;  // of the orders in which threads run

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  State state;
  double given[2];  // to this shuffle, and to the last, which others may still read
  bool turn;
};

inline ucontext_t scheduler;
inline Fiber* running;
inline std::vector<Fiber>* block;
inline std::function<void()> kernel;

inline void leave(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

inline void enter() {
  kernel();
  leave(State::done);
}

// lets the fibers from begin to end go on, if all have come to a barrier
inline void pass(std::vector<Fiber>& fibers, State barrier, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i)
    if (fibers[i].state != barrier) return;
  for (std::size_t i = begin; i < end; ++i) fibers[i].state = State::ready;
}

inline std::size_t count(const std::vector<Fiber>& fibers, State state) {
  return std::count_if(fibers.begin(), fibers.end(),
                       [&](const Fiber& f) { return f.state == state; });
}

inline void run_block(std::vector<Fiber>& fibers, std::mt19937_64& random) {
  std::vector<unsigned> order(fibers.size());
  std::iota(order.begin(), order.end(), 0u);
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = 1 << 16;
    f.state = State::ready;
    f.turn = false;
    makecontext(&f.context, enter, 0);
  }
  block = &fibers;
  while (count(fibers, State::done) < fibers.size()) {
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (fibers[i].state != State::ready) continue;
      threadIdx.x = i;
      running = &fibers[i];
      swapcontext(&scheduler, &running->context);
    }
    for (std::size_t i = 0; i < fibers.size(); i += 32)
      pass(fibers, State::at_warp, i, std::min(i + 32, fibers.size()));
    pass(fibers, State::at_block, 0, fibers.size());
    if (!count(fibers, State::ready) && count(fibers, State::done) < fibers.size()) {
      std::fprintf(stderr, "only %zu of %zu threads reach a barrier, %zu a shuffle\n",
                   count(fibers, State::at_block), fibers.size(), count(fibers, State::at_warp));
      std::abort();
    }
  }
}

// what the thread `other` of the same warp gives to this shuffle
template <class T>
T shuffle(T x, unsigned other) {
  static_assert(sizeof(T) <= sizeof(double));
  const bool turn = running->turn;
  std::memcpy(&running->given[turn], &x, sizeof x);
  running->turn = !turn;
  leave(State::at_warp);
  std::memcpy(&x, &(*block)[other].given[turn], sizeof x);
  return x;
}

// what Python gives as the address of its numbers
template <class Array>
Array array(const void* from) {
  Array result;
  std::memcpy(result.data(), from, sizeof result);
  return result;
}

}  // namespace emulator

inline void __syncthreads() { emulator::leave(emulator::State::at_block); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int offset) {
  return emulator::shuffle(x, threadIdx.x ^ offset);
}

// a lane without one `offset` lanes on keeps its own
template <class T>
T __shfl_down_sync(unsigned, T x, int offset) {
  return emulator::shuffle(x, threadIdx.x + (threadIdx.x % 32 + offset < 32 ? offset : 0));
}

template <class... Params, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Given&&... given) {
  const std::tuple<Params...> params(given...);
  std::vector<emulator::Fiber> fibers(config->blockDim.x);
  std::mt19937_64 random(emulator::seed);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::kernel = [&] { std::apply(kernel, params); };
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      emulator::run_block(fibers, random);
  return cudaSuccess;
}
