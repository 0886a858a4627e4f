// CUDA on the CPU, as far as fastxm's kernels go: so that their own source runs without a GPU.
//
// A block's threads are fibers. They run one after the other from barrier to barrier, in another
// order at every barrier if there is a seed: where a barrier is missing, results change with it.
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
  explicit dim3(unsigned x_) : x(x_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool waits, done;
};

inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> kernel;

inline void enter() {
  kernel();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

inline void run_block(std::vector<Fiber>& fibers, std::mt19937_64& random) {
  std::vector<unsigned> order(fibers.size());
  std::iota(order.begin(), order.end(), 0u);
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = 1 << 16;
    f.done = false;
    makecontext(&f.context, enter, 0);
  }
  for (bool all_done = false; !all_done;) {
    if (seed) std::shuffle(order.begin(), order.end(), random);
    std::size_t waiting = 0;
    all_done = true;
    for (unsigned i : order) {
      if (fibers[i].done) continue;
      threadIdx.x = i;
      running = &fibers[i];
      running->waits = false;
      swapcontext(&scheduler, &running->context);
      waiting += running->waits;
      all_done = all_done && running->done;
    }
    if (waiting && waiting != fibers.size()) {
      std::fprintf(stderr, "only %zu of %zu threads reach a barrier\n", waiting, fibers.size());
      std::abort();
    }
  }
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::running->waits = true;
  swapcontext(&emulator::running->context, &emulator::scheduler);
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
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    emulator::run_block(fibers, random);
  }
  return cudaSuccess;
}
