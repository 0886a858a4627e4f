// The instructions of AVX-512, of its bfloat16 and of AMX, as far as fastxm's kernels go, by loops
// over lanes: so that their own source runs on any x86-64 with AVX2. Included before that source.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "amx_emulator.h"

#define FASTXM_AVX512 __attribute__((target("arch=x86-64-v3")))
#define FASTXM_AVX512_BF16 FASTXM_AVX512
#define FASTXM_AMX
#define EMULATED FASTXM_AVX512 inline __attribute__((always_inline))

namespace emulator {

constexpr int kLanes = 16;

typedef std::uint32_t Words __attribute__((vector_size(64), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(64), may_alias));
typedef std::uint16_t HalfOfHalves __attribute__((vector_size(32), may_alias));

EMULATED float wide(std::uint16_t half) { return value(std::uint32_t{half} << 16); }

EMULATED std::uint16_t rounded(float x) {  // to the nearest, ties to even; the smallest are 0
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  if (!(bits & 0x7f800000u)) return static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// lanes that a mask leaves out are neither read nor written
template <class V>
EMULATED V load_lanes(__mmask16 mask, const void* from) {
  V x = {};
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) {
      auto lane = x[i];
      std::memcpy(&lane, static_cast<const char*>(from) + i * sizeof(lane), sizeof(lane));
      x[i] = lane;
    }
  return x;
}
template <class V>
EMULATED void store_lanes(void* to, __mmask16 mask, V x) {
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) {
      const auto lane = x[i];
      std::memcpy(static_cast<char*>(to) + i * sizeof(lane), &lane, sizeof(lane));
    }
}

// an address that an instruction wants to be a vector's
template <class T>
EMULATED T* aligned(T* p) {
  demand(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
  return p;
}

EMULATED __m512 fma(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}

EMULATED __m512 products_of_pairs(__m512 sums, Halves a, Halves b) {
  for (int i = 0; i < kLanes; ++i) {
    sums[i] = std::fma(wide(a[2 * i + 1]), wide(b[2 * i + 1]), sums[i]);
    sums[i] = std::fma(wide(a[2 * i]), wide(b[2 * i]), sums[i]);
  }
  return sums;
}

EMULATED HalfOfHalves halves(__m512 x) {
  HalfOfHalves out = {};
  for (int i = 0; i < kLanes; ++i) out[i] = rounded(x[i]);
  return out;
}
EMULATED Halves halves(__m512 high, __m512 low) {
  Halves out = {};
  for (int i = 0; i < kLanes; ++i) out[i] = rounded(low[i]), out[i + kLanes] = rounded(high[i]);
  return out;
}

EMULATED __m256i half_of(__m512i x, int half) {
  __m256i out = {};
  for (int i = 0; i < 4; ++i) out[i] = x[i + 4 * half];
  return out;
}

EMULATED Words widened(HalfOfHalves x) {
  Words out = {};
  for (int i = 0; i < kLanes; ++i) out[i] = x[i];
  return out;
}

EMULATED Halves chosen(Halves order, Halves from) {
  Halves out = {};
  for (int i = 0; i < 2 * kLanes; ++i) out[i] = from[order[i] % (2 * kLanes)];
  return out;
}
EMULATED Words chosen(Words from, Words order, Words second) {
  Words out = {};
  for (int i = 0; i < kLanes; ++i) {
    const int at = order[i] % kLanes;
    out[i] = order[i] & kLanes ? second[at] : from[at];
  }
  return out;
}

EMULATED __mmask16 not_less(__mmask16 mask, __m512 a, __m512 b) {  // NaN is not
  unsigned out = 0;
  for (int i = 0; i < kLanes; ++i) out |= unsigned{(mask >> i & 1) && !(a[i] < b[i])} << i;
  return static_cast<__mmask16>(out);
}

EMULATED __m512 chosen(__m512 otherwise, __mmask16 mask, __m512 x) {
  for (int i = 0; i < kLanes; ++i) otherwise[i] = mask >> i & 1 ? x[i] : otherwise[i];
  return otherwise;
}

EMULATED __m512 larger(__m512 a, __m512 b) {  // b where one is NaN
  for (int i = 0; i < kLanes; ++i) b[i] = a[i] > b[i] ? a[i] : b[i];
  return b;
}

EMULATED __m512 absolute(__m512 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::fabs(x[i]);
  return x;
}

EMULATED __m512 times_power(__m512 x, __m512 n) {
  for (int i = 0; i < kLanes; ++i) {
    const float power = std::floor(n[i]);
    x[i] = power < -1000    ? 0 * x[i]
           : power > 1000   ? x[i] * INFINITY
           : power != power ? power
                            : std::ldexp(x[i], static_cast<int>(power));
  }
  return x;
}

EMULATED __m512 above_whole(__m512 x) {  // x less the whole number below it
  for (int i = 0; i < kLanes; ++i) x[i] = x[i] - std::floor(x[i]);
  return x;
}

EMULATED float sum(__m512 x) {  // halves upon halves
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] + x[i + n];
  return x[0];
}
EMULATED float largest(__m512 x) {
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}

constexpr __mmask16 kAll = 0xffff;

}  // namespace emulator

#undef _mm512_setr_epi32
#undef _mm512_reduce_ps
#undef _mm512_extracti64x4_epi64
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_slli_epi32

#define _mm512_set1_ps(x) (__m512{} + static_cast<float>(x))
#define _mm512_set1_epi32(x) ((__m512i)(emulator::Words{} + static_cast<std::uint32_t>(x)))
#define _mm512_setr_epi32(...) ((__m512i)(emulator::Words{__VA_ARGS__}))
#define _mm512_setzero_ps() (__m512{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_castsi512_ps(x) ((__m512)(x))

#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_fmadd_ps(a, b, c) emulator::fma(a, b, c)
#define _mm512_fnmadd_ps(a, b, c) emulator::fma(-(a), b, c)
#define _mm512_fmsub_ps(a, b, c) emulator::fma(a, b, -(c))
#define _mm512_max_ps(a, b) emulator::larger(a, b)
#define _mm512_mask_max_ps(x, mask, a, b) emulator::chosen(x, mask, emulator::larger(a, b))
#define _mm512_abs_ps(x) emulator::absolute(x)
#define _mm512_reduce_ps(x, down) emulator::above_whole(x)
#define _mm512_maskz_scalef_ps(mask, x, n) \
  emulator::chosen(__m512{}, mask, emulator::times_power(x, n))
#define _mm512_mask_mov_ps(otherwise, mask, x) emulator::chosen(otherwise, mask, x)
#define _mm512_maskz_mov_ps(mask, x) emulator::chosen(__m512{}, mask, x)
#define _mm512_mask_cmp_ps_mask(mask, a, b, not_less_or_nan) emulator::not_less(mask, a, b)
#define _mm512_cmp_ps_mask(a, b, not_less_or_nan) emulator::not_less(emulator::kAll, a, b)
#define _mm512_reduce_add_ps(x) emulator::sum(x)
#define _mm512_reduce_max_ps(x) emulator::largest(x)

#define _mm512_add_epi32(a, b) ((__m512i)((emulator::Words)(a) + (emulator::Words)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((emulator::Words)(a) & (emulator::Words)(b)))
#define _mm512_or_si512(a, b) ((__m512i)((emulator::Words)(a) | (emulator::Words)(b)))
#define _mm512_slli_epi32(x, n) ((__m512i)((emulator::Words)(x) << (n)))
#define _mm512_permutex2var_epi32(a, order, b) \
  ((__m512i)emulator::chosen((emulator::Words)(a), (emulator::Words)(order), (emulator::Words)(b)))
#define _mm512_permutexvar_epi16(order, x) \
  ((__m512i)emulator::chosen((emulator::Halves)(order), (emulator::Halves)(x)))
#define _mm512_extracti64x4_epi64(x, half) emulator::half_of(x, half)
#define _mm512_castsi512_si256(x) emulator::half_of(x, 0)
#define _mm512_cvtepu16_epi32(x) ((__m512i)emulator::widened((emulator::HalfOfHalves)(x)))

#define _mm512_cvtneps_pbh(x) ((__m256i)emulator::halves(x))
#define _mm512_cvtne2ps_pbh(high, low) ((__m512i)emulator::halves(high, low))
#define _mm512_dpbf16_ps(sums, a, b) \
  emulator::products_of_pairs(sums, (emulator::Halves)(a), (emulator::Halves)(b))

#define _mm512_maskz_loadu_ps(mask, p) emulator::load_lanes<__m512>(mask, p)
#define _mm512_load_ps(p) emulator::load_lanes<__m512>(emulator::kAll, emulator::aligned(p))
#define _mm512_maskz_loadu_epi32(mask, p) ((__m512i)emulator::load_lanes<emulator::Words>(mask, p))
#define _mm512_loadu_si512(p) _mm512_maskz_loadu_epi32(emulator::kAll, p)
#define _mm512_load_si512(p) _mm512_loadu_si512(emulator::aligned(p))
#define _mm256_maskz_loadu_epi16(mask, p) \
  ((__m256i)emulator::load_lanes<emulator::HalfOfHalves>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, x) emulator::store_lanes<__m512>(p, mask, x)
#define _mm512_store_ps(p, x) emulator::store_lanes<__m512>(emulator::aligned(p), emulator::kAll, x)
#define _mm512_mask_storeu_epi32(p, mask, x) \
  emulator::store_lanes<emulator::Words>(p, mask, (emulator::Words)(x))
#define _mm512_storeu_si512(p, x) _mm512_mask_storeu_epi32(p, emulator::kAll, x)
#define _mm256_mask_storeu_epi16(p, mask, x) \
  emulator::store_lanes<emulator::HalfOfHalves>(p, mask, (emulator::HalfOfHalves)(x))

// a processor and a system that have all of it
#define __builtin_cpu_supports(name) true
#define __get_cpuid_count(leaf, part, a, b, c, d) \
  (*(a) = *(b) = *(c) = 0, *(d) = 1u << 22 | 1u << 24, 1)
#define syscall(...) 0
