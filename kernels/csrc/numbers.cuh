// Numbers: single operations, conversions and hashes, the same on the GPU and on a host without one.
//
// Every product and sum is rounded by itself: the intrinsics are never fused, and a host build needs -ffp-contract=off.
// On the host plain C++ stands in for an instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define WANTRAIN_BOTH __host__ __device__ __forceinline__
#else
#define WANTRAIN_BOTH inline
#endif
#ifdef __CUDA_ARCH__
#define WANTRAIN_UNROLL _Pragma("unroll")
#else
#define WANTRAIN_UNROLL
#endif

namespace wantrain {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, NOTHING = 3 };

constexpr int OCTET = 8;
constexpr u32 NAN_SCALE = 0x7FC0;
constexpr u32 INFINITE = 0x7F800000;
constexpr float LEAST = 7.888609052210118e-31f;       // 2^-100
constexpr float MOST_SCALE = 4.253529586511731e+37f;  // 2^125
constexpr float SAFE_SCALE = 8.077935669463161e-28f;  // 2^-90, see make_storable
// 1.5 · 2^23: a sum with it is rounded to a whole number (ties to even), which its low bits hold.
constexpr float ROUNDER = 12582912.0f;

WANTRAIN_BOTH u32 bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

WANTRAIN_BOTH float float_of(u32 bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

WANTRAIN_BOTH float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

WANTRAIN_BOTH float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

WANTRAIN_BOTH float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Return 1/a, correctly rounded.
WANTRAIN_BOTH float reciprocal(float a) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(a);
#else
  return 1.0f / a;
#endif
}

WANTRAIN_BOTH float clamp(float value, float least, float greatest) {
#ifdef __CUDA_ARCH__
  return fminf(fmaxf(value, least), greatest);
#else
  return value < least ? least : value > greatest ? greatest : value;
#endif
}

// Return the greater magnitude; NaN if either is NaN.
WANTRAIN_BOTH float greater_magnitude(float a, float b) {
#ifdef __CUDA_ARCH__
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(fabsf(a)), "f"(fabsf(b)));
  return greater;
#else
  a = std::fabs(a), b = std::fabs(b);
  return std::isnan(a) || a > b ? a : b;
#endif
}

// Return a rounder plus the greatest whole number that is not above the value, for |value| < 2^22.
WANTRAIN_BOTH float floor_onto(float value, float rounder) {
#ifdef __CUDA_ARCH__
  return __fadd_rd(value, rounder);
#else
  return std::floor(value) + rounder;
#endif
}

// Mix 32 bits (C. Wellons' "lowbias32", improved constants).
WANTRAIN_BOTH u32 mix(u32 number) {
  number = (number ^ number >> 16) * 0x21F0AAADu;
  number = (number ^ number >> 15) * 0xD35A2D97u;
  return number ^ number >> 15;
}

// Return the digest's weight of a place.
WANTRAIN_BOTH u32 weight(u32 place) {
  u32 number = place * 0x9E3779B1u;
  return ((number ^ number >> 15) * 0x85EBCA77u) | 1u;
}

// Return (2·(r >> 9) + 1)·2^-24 for the random r of a place. 1 + (r >> 9)·2^-23 is an exponent beside the bits of r;
// what is taken from it leaves 24 bits: exact.
WANTRAIN_BOTH float uniform(u32 key_low, u32 key_high, u32 place) {
  u32 random = mix(mix(place ^ key_low) + key_high);
  return subtract(float_of(0x3F800000u | random >> 9), 0.999999940395355224609375f);
}

WANTRAIN_BOTH u32 bfloat16_of(float value) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return pair;
#else
  u32 bits = bits_of(value);
  return value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
#endif
}

#ifndef __CUDA_ARCH__
// Return fp16 bits, rounded to nearest even; magnitudes from 65520 on are infinite.
inline u32 float16_of(float value) {
  u32 sign = bits_of(value) >> 16 & 0x8000u, magnitude = bits_of(value) & 0x7FFFFFFFu;
  if (magnitude > INFINITE) return 0x7FFFu;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;
  if (magnitude < 0x38800000u) {  // below 2^-14 steps are 2^-24: a sum with 0.5 has just this step
    return sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u);
  }
  return sign | (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
}

inline float float_of_float16(u32 bits) {
  float magnitude = float_of((bits & 0x7FFFu) << 13) * 5.192296858534828e+33f;  // 2^112 moves the exponent, exactly
  if ((bits & 0x7C00u) == 0x7C00u) magnitude = float_of(INFINITE | (bits & 0x3FFu) << 13);
  return (bits & 0x8000u) ? -magnitude : magnitude;
}
#endif

// Return two values as a pair of 16-bit numbers, the first in the low half. SATURATE: at most the greatest finite one.
template <Type TYPE, bool SATURATE>
WANTRAIN_BOTH u32 pair_of(float first, float second) {
  static_assert(TYPE == BFLOAT16 || TYPE == FLOAT16, "a pair is of 16-bit numbers");
#ifdef __CUDA_ARCH__
  u32 pair;
  if (TYPE == BFLOAT16 && SATURATE) {
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else if (TYPE == BFLOAT16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else if (SATURATE) {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  float most = TYPE == BFLOAT16 ? 3.3895313892515355e38f : 65504.0f;
  if (SATURATE) first = clamp(first, -most, most), second = clamp(second, -most, most);
  return TYPE == BFLOAT16 ? bfloat16_of(first) | bfloat16_of(second) << 16
                          : float16_of(first) | float16_of(second) << 16;
#endif
}

// Return one half of a pair as fp32, exactly.
template <Type TYPE>
WANTRAIN_BOTH float half_of(u32 pair, int half) {
  if (TYPE == BFLOAT16) return float_of(half ? pair & 0xFFFF0000u : pair << 16);
  u16 bits = static_cast<u16>(half ? pair >> 16 : pair);
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return float_of_float16(bits);
#endif
}

// Return the greater of each half of two pairs of magnitudes; as whole numbers they compare like the values.
WANTRAIN_BOTH u32 greater_halves(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  return __vmaxu2(a, b);
#else
  u32 low = (a & 0xFFFFu) > (b & 0xFFFFu) ? a & 0xFFFFu : b & 0xFFFFu;
  return low | (a >> 16 > b >> 16 ? a >> 16 : b >> 16) << 16;
#endif
}

}  // namespace wantrain
