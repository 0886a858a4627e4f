// What CUDA kernels share: launch checks, conversions, block reductions in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastxm {

inline void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// of a launch: in a row, or in rows
struct Grid {
  std::int64_t x, y;
  Grid(std::int64_t x_, std::int64_t y_ = 1) : x(x_), y(y_) {}
};

// runs a kernel over some blocks, or nothing if there are none
template <class... Params, class... Given>
void launch(const char* name, void (*kernel)(Params...), Grid grid, int threads,
            cudaStream_t stream, const Given&... given) {
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x >= std::int64_t(1) << 31 || grid.y >= std::int64_t(1) << 16)
    throw std::invalid_argument(std::string(name) + ": too many blocks for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, given...);
  check_launch(name);
}

// an address that arrived from Python as an integer
template <class T>
T* pointer(std::uintptr_t at) {
  return reinterpret_cast<T*>(at);
}

// __expf errs by |x| ulp: the larger that is, the less exp x counts in a sum
__device__ __forceinline__ float exp_fast(float x) { return __expf(x); }
__device__ __forceinline__ double exp_fast(double x) { return exp(x); }
__device__ __forceinline__ float log1p_fast(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_fast(double x) { return log1p(x); }

// of float within two ulp
__device__ __forceinline__ float divide_fast(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double divide_fast(double a, double b) { return a / b; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(double x, double& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half(x); }

// sum over a warp; every lane receives it
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// the largest number of a warp, or -inf; every lane receives it
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const T other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// sum over a block of kThreads; every thread receives it. scratch: kThreads / 32 values
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if constexpr (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

// n / d for n < 2^31, in a multiplication and a shift
struct Divisor {
  unsigned d, factor, shift;
  explicit Divisor(int64_t value) : d(static_cast<unsigned>(value)), factor(0), shift(0) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    factor = static_cast<unsigned>(
        ((std::uint64_t(1) << 32) * ((std::uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ int div(int n) const {
    return static_cast<int>((__umulhi(unsigned(n), factor) + unsigned(n)) >> shift);
  }
};

// V neighbours, moved in 16 bytes at a time
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T at[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

}  // namespace fastxm
