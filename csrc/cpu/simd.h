// What CPU kernels share: run-time choice of instruction set, vectorisable maths, bfloat16.
#pragma once

#if defined(__SSE2__)
// GCC 12 takes what its own intrinsics leave undefined on purpose for a mistake
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

// a function so marked is compiled once for each instruction set and chosen when the module loads
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FASTXM_MULTIARCH \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTXM_MULTIARCH
#endif

// helpers are inlined into each version, so that they are vectorised with it
#define FASTXM_INLINE inline __attribute__((always_inline))

namespace fastxm {

// What this machine can do, or less where the environment's FASTXM_CPU_LEVEL says so: "avx512",
// "avx2" or "x86-64" (neither). Of functions marked as above a level leaves out only what asks for
// it here: tiles, and whole functions by AVX-512 or AMX.
inline const char* cpu_level() {
  static const char* const level = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    const char* asked = std::getenv("FASTXM_CPU_LEVEL");
    const std::string most = asked ? asked : "";
    __builtin_cpu_init();
    if (most == "x86-64") return "x86-64";
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && most != "avx2")
      return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
    return "x86-64";
#else
    return "portable";
#endif
  }();
  return level;
}

inline bool has_avx512() {
  static const bool has = !std::strcmp(cpu_level(), "avx512");
  return has;
}

inline bool has_avx2() {
  static const bool has = has_avx512() || !std::strcmp(cpu_level(), "avx2");
  return has;
}

// a pointer that arrived from Python as an integer
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct bfloat16 {
  std::uint16_t bits;
};

FASTXM_INLINE float to_float(float x) { return x; }
FASTXM_INLINE double to_float(double x) { return x; }
FASTXM_INLINE float to_float(bfloat16 x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTXM_INLINE void from_float(float x, float& y) { y = x; }
FASTXM_INLINE void from_float(double x, double& y) { y = x; }
FASTXM_INLINE void from_float(float x, bfloat16& y) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // round to nearest even; a NaN stays one, without a branch that loops could not be vectorised for
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y.bits = static_cast<std::uint16_t>(rounded | (-static_cast<std::uint32_t>(x != x) & 0x7fc0u));
}

// 2^f for f in [0, 1], to half a unit in the last place: 1 + f (kPower[0] + f (kPower[1] + ...))
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kPower[] = {6.93147123e-1f, 2.40227863e-1f, 5.54929040e-2f,
                            9.65861976e-3f, 1.26319833e-3f, 2.10290280e-4f};

// e^x in straight-line code that vectorises, as exact as an x that has been rounded: to 2^-24 (1 +
// |x|) of it. Nearly 0 below -87.3, inf above 88.7, NaN kept.
FASTXM_INLINE float exp_fast(float x) {
  float t = x * kLog2e;
  t = t < -127 ? -127 : (t > 128 ? 128 : t);
  const float n = std::floor(t), f = t - n;
  float p = std::fma(kPower[5], f, kPower[4]);  // no loop: it would be one in the caller's
  p = std::fma(p, f, kPower[3]);
  p = std::fma(p, f, kPower[2]);
  p = std::fma(p, f, kPower[1]);
  p = std::fma(p, f, kPower[0]);
  p = std::fma(p, f, 1.0f);
  // times 2^n: p is 1 where n is 128 or -127
  std::uint32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += static_cast<std::uint32_t>(static_cast<std::int32_t>(n)) << 23;
  float y;
  std::memcpy(&y, &bits, 4);
  return x != x ? x : y;
}
FASTXM_INLINE double exp_fast(double x) { return std::exp(x); }

// log v for finite v >= 1: v = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m-1)/(m+1))
FASTXM_INLINE float log_fast(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const std::uint32_t shifted = bits - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
  bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  std::memcpy(&m, &bits, 4);
  const float z = (m - 1) / (m + 1), z2 = z * z;
  float p = 1.0f / 9;
  p = std::fma(p, z2, 1.0f / 7);
  p = std::fma(p, z2, 1.0f / 5);
  p = std::fma(p, z2, 1.0f / 3);
  const float tail = std::fma(2 * z * z2, p, e * 1.42860682030941723e-6f);
  return std::fma(e, 0.693145751953125f, 2 * z + tail);
}
FASTXM_INLINE float log1p_fast(float u) {
  const float v = 1 + u;
  return log_fast(v) + (u - (v - 1)) / v;  // what rounding 1 + u left out
}
FASTXM_INLINE double log1p_fast(double u) { return std::log1p(u); }

// results below the normal range become 0 at once: they cost a hundred cycles each otherwise
struct FlushToZero {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040u); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

}  // namespace fastxm
