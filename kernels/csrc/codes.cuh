// What becomes of one value, one octet and one group; `reference.py` defines it.
#pragma once

#include "numbers.cuh"

namespace wantrain {

// The levels of `BITS` bits: mid-rise up to 4, mid-tread above.
template <int BITS>
struct Levels {
  static constexpr bool IS_MID_RISE = BITS <= 4;
  static constexpr float OFFSET = IS_MID_RISE ? 0.5f : 0.0f;
  static constexpr int BIAS = (1 << (BITS - 1)) - (IS_MID_RISE ? 0 : 1);
  static constexpr int GREATEST_Q = (1 << (BITS - 1)) - 1;
};

// Return K of a number of bits.
inline float scale_factor(int bits, bool stochastic) {
  double clip = stochastic || bits > 4 ? 1.0 : bits == 2 ? 0.56 : bits == 3 ? 0.78 : 0.90;
  return static_cast<float>(clip / ((1 << (bits - 1)) - 1 + (bits <= 4 ? 0.5 : 0.0)));
}

struct Scale {
  u32 bits;       // bf16
  float value;    // 0 in a group that is not finite: its levels add nothing
  float inverse;  // 0 where the value is 0
  bool is_finite;
};

// Return a group's scale from the bits of its greatest magnitude.
WANTRAIN_BOTH Scale scale_of(u32 greatest, float factor) {
  Scale scale;
  scale.is_finite = greatest < INFINITE;
  float wanted = multiply(float_of(greatest), factor);
  wanted = wanted > MOST_SCALE ? MOST_SCALE : wanted;
  bool is_zero = wanted < LEAST || !scale.is_finite;
  u32 bits = is_zero ? 0u : bfloat16_of(wanted);
  scale.value = float_of(bits << 16);
  float inverse = reciprocal(is_zero ? 1.0f : scale.value);
  scale.inverse = is_zero ? 0.0f : inverse;
  scale.bits = scale.is_finite ? bits : NAN_SCALE;
  return scale;
}

// One octet's codes as a little-endian integer of up to 64 bits.
struct alignas(8) Codes {
  u32 low, high;
};

template <int BITS>
WANTRAIN_BOTH Codes joined(u32 first, u32 second) {
  if (BITS == 6) return {first | second << 24, second >> 8};
  return {first, second};
}

// A word holds the codes of 8 values up to 4 bits, of 4 values above.
template <int BITS>
constexpr int VALUES_PER_WORD = BITS <= 4 ? OCTET : OCTET / 2;

// Join the low bits of eight numbers ROUNDER + q as codes q + BIAS. All is modulo 2^32, so what ROUNDER and BIAS add is
// one constant, and a value costs one shifted sum.
template <int BITS>
WANTRAIN_BOTH Codes codes_of(const float (&sums)[OCTET]) {
  constexpr u32 EACH = static_cast<u32>(Levels<BITS>::BIAS) - 0x4B400000u;
  u32 words[2] = {0, 0};
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    int place = BITS * (i % VALUES_PER_WORD<BITS>);
    words[i / VALUES_PER_WORD<BITS>] += EACH << place;
  }
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    int place = BITS * (i % VALUES_PER_WORD<BITS>);
    words[i / VALUES_PER_WORD<BITS>] += bits_of(sums[i]) << place;
  }
  return joined<BITS>(words[0], words[1]);
}

// Return the low halves of two floats' bits, each a signed number, clamped to 0 … top.
WANTRAIN_BOTH u32 clamped_pair(float first, float second, u32 top) {
#ifdef __CUDA_ARCH__
  return __vimin_s16x2_relu(__byte_perm(bits_of(first), bits_of(second), 0x5410), top | top << 16);
#else
  auto clamped = [top](float sum) {
    int number = static_cast<std::int16_t>(bits_of(sum));
    return static_cast<u32>(number < 0 ? 0 : number > static_cast<int>(top) ? static_cast<int>(top) : number);
  };
  return clamped(first) | clamped(second) << 16;
#endif
}

// Join numbers ROUNDER + BIAS + q as codes, clamping two at a time: those half a word apart, so that shifted sums put
// all in order: (c0 | c4 << 16) + ((c1 | c5 << 16) << 4) + … = c0 | c1 << 4 | … | c7 << 28.
template <int BITS>
WANTRAIN_BOTH Codes clamped_codes_of(const float (&sums)[OCTET]) {
  constexpr u32 TOP = Levels<BITS>::BIAS + Levels<BITS>::GREATEST_Q;
  constexpr int HALF = VALUES_PER_WORD<BITS> / 2, WIDTH = BITS * HALF;
  u32 words[2] = {0, 0};
  WANTRAIN_UNROLL
  for (int w = 0; w < OCTET / (2 * HALF); ++w) {
    WANTRAIN_UNROLL
    for (int i = 0; i < HALF; ++i) {
      words[w] += clamped_pair(sums[2 * HALF * w + i], sums[2 * HALF * w + HALF + i], TOP) << (BITS * i);
    }
    if (WIDTH < 16) words[w] = (words[w] & ((1u << WIDTH) - 1u)) | words[w] >> 16 << WIDTH;
  }
  return joined<BITS>(words[0], words[1]);
}

// Keep the codes of the first `count` values.
template <int BITS>
WANTRAIN_BOTH Codes first_codes(Codes codes, int count) {
  u64 kept = ~u64{0} >> (64 - BITS * OCTET) >> (BITS * (OCTET - count));
  u64 all = (u64{codes.high} << 32 | codes.low) & kept;
  return {static_cast<u32>(all), static_cast<u32>(all >> 32)};
}

// Return q + offset of value i of an octet. At 2^22 a float's step is ½: 2^22 + code is put together from bits, and
// 2^22 + BIAS − OFFSET taken away.
template <int BITS>
WANTRAIN_BOTH float level_of(Codes codes, int i) {
  constexpr u32 MASK = (1u << BITS) - 1u;
  int place = BITS * i;
  u32 code = place >= 32          ? codes.high >> (place - 32)
             : place + BITS <= 32 ? codes.low >> place
                                  : codes.low >> place | codes.high << (32 - place);
  u32 sum = 0x4A800000u + ((code & MASK) << 1);
  return subtract(float_of(sum), 4194304.0f + Levels<BITS>::BIAS - Levels<BITS>::OFFSET);
}

// Where the random numbers of an octet come from.
struct Noise {
  u32 key_low, key_high, place;
};

// Turn values into v − o, or v − o + u; rounded, they are q.
template <int BITS, bool STOCHASTIC>
WANTRAIN_BOTH void scale_octet(float (&values)[OCTET], const Scale& scale, const Noise& noise) {
  // A scale of 0 means q = 0: nearest rounds −½ to 0 by itself, a floor needs the offset gone.
  float offset = STOCHASTIC && scale.inverse == 0.0f ? 0.0f : Levels<BITS>::OFFSET;
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    values[i] = multiply(values[i], scale.inverse);
    if (Levels<BITS>::IS_MID_RISE) values[i] = subtract(values[i], offset);
    if (STOCHASTIC) values[i] = add(values[i], uniform(noise.key_low, noise.key_high, noise.place + i));
  }
}

// Unclipped mid-tread stays within the levels when rounded to nearest: a bf16 scale is at most 2^-8 too small, and
// 127 · (1 + 2^-8) < 127.5.
template <int BITS, bool STOCHASTIC>
constexpr bool MAY_LEAVE_LEVELS = STOCHASTIC || Levels<BITS>::IS_MID_RISE;

template <bool STOCHASTIC>
WANTRAIN_BOTH float onto_rounder(float value, float rounder) {
  return STOCHASTIC ? floor_onto(value, rounder) : add(value, rounder);
}

// Make sums ROUNDER + q.
template <int BITS, bool STOCHASTIC>
WANTRAIN_BOTH void round_octet(const float (&scaled)[OCTET], float (&sums)[OCTET]) {
  using L = Levels<BITS>;
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    float v = scaled[i];
    if (MAY_LEAVE_LEVELS<BITS, STOCHASTIC>) v = clamp(v, -L::BIAS, L::GREATEST_Q);
    sums[i] = onto_rounder<STOCHASTIC>(v, ROUNDER);
  }
}

// Round where only the codes are wanted.
template <int BITS, bool STOCHASTIC>
WANTRAIN_BOTH Codes rounded_codes_of(const float (&scaled)[OCTET]) {
  constexpr bool IS_CLAMPED = MAY_LEAVE_LEVELS<BITS, STOCHASTIC>;
  // Ties go to even numbers also where the bias is added before: it is even where values are rounded to nearest.
  constexpr float BASE = IS_CLAMPED ? ROUNDER + Levels<BITS>::BIAS : ROUNDER;
  float sums[OCTET];
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) sums[i] = onto_rounder<STOCHASTIC>(scaled[i], BASE);
  return IS_CLAMPED ? clamped_codes_of<BITS>(sums) : codes_of<BITS>(sums);
}

WANTRAIN_BOTH u32 greatest_finite(const float (&values)[OCTET]) {
  u32 most = 0;
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    u32 magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    if (magnitude < INFINITE && magnitude > most) most = magnitude;
  }
  return most;
}

// Give NaN 0 and ±infinity ± the greatest finite magnitude of its group.
WANTRAIN_BOTH void bound(float (&values)[OCTET], float greatest) {
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    u32 magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    if (magnitude >= INFINITE) values[i] = magnitude > INFINITE ? 0.0f : values[i] > 0.0f ? greatest : -greatest;
  }
}

// Return y as it is stored where anything may happen: small values as 0, the unknown as m. (The greatest is the
// conversion's part.)
WANTRAIN_BOTH float storable(float y, float m) {
  float kept = y != y ? m : y;
  return std::fabs(kept) < LEAST ? 0.0f : kept;
}

}  // namespace wantrain
