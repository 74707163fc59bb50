// Loads and stores of one octet: 16 bytes at once where tensors and rows are aligned (ALIGNED), else piece by piece.
#pragma once

#include "call.cuh"

namespace wantrain {

struct alignas(16) Block16 {
  u32 word[4];
};

// Read what no thread of the kernel writes.
WANTRAIN_BOTH Block16 load_constant(const void* from, i64 index) {
  const Block16* block = static_cast<const Block16*>(from) + index;
#ifdef __CUDA_ARCH__
  uint4 words = __ldg(reinterpret_cast<const uint4*>(block));
  return {words.x, words.y, words.z, words.w};
#else
  return *block;
#endif
}

WANTRAIN_BOTH Block16 load(const void* from, i64 index) {
#ifdef __CUDA_ARCH__
  uint4 words = static_cast<const uint4*>(from)[index];
  return {words.x, words.y, words.z, words.w};
#else
  return static_cast<const Block16*>(from)[index];
#endif
}

WANTRAIN_BOTH void store(void* to, i64 index, const Block16& block) {
#ifdef __CUDA_ARCH__
  static_cast<uint4*>(to)[index] = make_uint4(block.word[0], block.word[1], block.word[2], block.word[3]);
#else
  static_cast<Block16*>(to)[index] = block;
#endif
}

// An octet of values as it came: the conversion waits until the next load is under way.
template <Type TYPE>
struct Octet {
  static constexpr int NUM_BLOCKS = TYPE == FLOAT32 ? 2 : 1;
  Block16 block[NUM_BLOCKS];

  WANTRAIN_BOTH float operator[](int i) const {
    if constexpr (TYPE == FLOAT32) {
      return float_of(block[i / 4].word[i % 4]);
    } else {
      return half_of<TYPE>(block[0].word[i / 2], i % 2);
    }
  }

  // Return the fp32 bits of the greatest magnitude of 16-bit values: two at a time, before any is converted.
  WANTRAIN_BOTH u32 greatest() const {
    u32 pair = 0;
    WANTRAIN_UNROLL
    for (int i = 0; i < 4; ++i) pair = greater_halves(pair, block[0].word[i] & 0x7FFF7FFFu);
    return bits_of(half_of<TYPE>(greater_halves(pair, pair >> 16), 0));
  }
};

// Return an octet, zeros where no value is. CONSTANT: no thread writes there.
template <Type TYPE, bool ALIGNED, bool CONSTANT>
WANTRAIN_BOTH Octet<TYPE> load_octet(const void* from, const Place& place) {
  Octet<TYPE> octet{};
  if (!place.is_there) return octet;
  if constexpr (ALIGNED) {
    WANTRAIN_UNROLL
    for (int b = 0; b < octet.NUM_BLOCKS; ++b) {
      i64 index = place.octet * octet.NUM_BLOCKS + b;
      octet.block[b] = CONSTANT ? load_constant(from, index) : load(from, index);
    }
  } else {
    WANTRAIN_UNROLL
    for (int i = 0; i < OCTET; ++i) {
      if (i >= place.count) continue;
      if constexpr (TYPE == FLOAT32) {
        octet.block[i / 4].word[i % 4] = static_cast<const u32*>(from)[place.value + i];
      } else {
        octet.block[0].word[i / 2] |= u32{static_cast<const u16*>(from)[place.value + i]} << (16 * (i % 2));
      }
    }
  }
  return octet;
}

template <Type TYPE, bool ALIGNED>
WANTRAIN_BOTH void store_octet(void* to, const Place& place, const Octet<TYPE>& octet) {
  if constexpr (ALIGNED) {
    WANTRAIN_UNROLL
    for (int b = 0; b < octet.NUM_BLOCKS; ++b) store(to, place.octet * octet.NUM_BLOCKS + b, octet.block[b]);
  } else {
    WANTRAIN_UNROLL
    for (int i = 0; i < OCTET; ++i) {
      if (i >= place.count) continue;
      if constexpr (TYPE == FLOAT32) {
        static_cast<u32*>(to)[place.value + i] = octet.block[i / 4].word[i % 4];
      } else {
        static_cast<u16*>(to)[place.value + i] = static_cast<u16>(octet.block[0].word[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

// Return values as an octet of a type. SATURATE: clamped to the greatest finite number.
template <Type TYPE, bool SATURATE>
WANTRAIN_BOTH Octet<TYPE> octet_of(const float (&values)[OCTET]) {
  Octet<TYPE> octet;
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    if constexpr (TYPE == FLOAT32) {
      octet.block[i / 4].word[i % 4] = bits_of(values[i]);
    } else if (i % 2 == 0) {
      octet.block[0].word[i / 2] = pair_of<TYPE, SATURATE>(values[i], values[i + 1]);
    }
  }
  return octet;
}

// Return the part of the digest that an octet of stored 16-bit values makes.
template <Type TYPE, bool ALIGNED>
WANTRAIN_BOTH u32 digest_of(const Octet<TYPE>& stored, const Place& place) {
  u32 sum = 0, first = static_cast<u32>(place.value);
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) {
    u32 pair = stored.block[0].word[i / 2], half = i % 2 ? pair >> 16 : pair & 0xFFFFu;
    if (ALIGNED || i < place.count) sum += (half + 1u) * weight(first + i);
  }
  return sum;
}

// The bytes of an octet's codes are read in words where its address allows: 8, 4 and 2 bytes at 8, 4 and 2 bits, three
// 2-byte words at 6, three bytes at 3.
template <int BITS, bool ALIGNED>
WANTRAIN_BOTH Codes load_codes(const u8* codes, i64 octet) {
  const u8* from = codes + octet * BITS;
  if constexpr (ALIGNED && BITS == 8) {
    return *reinterpret_cast<const Codes*>(from);
  } else if constexpr (ALIGNED && BITS == 4) {
    return {*reinterpret_cast<const u32*>(from), 0};
  } else if constexpr (ALIGNED && BITS % 2 == 0) {
    const u16* half = reinterpret_cast<const u16*>(from);
    if constexpr (BITS == 2) return {half[0], 0};
    else return {half[0] | u32{half[1]} << 16, half[2]};
  } else {
    Codes loaded{0, 0};
    WANTRAIN_UNROLL
    for (int i = 0; i < BITS; ++i) (i < 4 ? loaded.low : loaded.high) |= u32{from[i]} << (8 * (i % 4));
    return loaded;
  }
}

template <int BITS>
WANTRAIN_BOTH void store_code_bytes(u8* to, Codes codes) {
  WANTRAIN_UNROLL
  for (int i = 0; i < BITS; ++i) to[i] = static_cast<u8>((i < 4 ? codes.low : codes.high) >> (8 * (i % 4)));
}

// Store an octet's codes. With 3 and 6 bits, four (two) neighbouring lanes hold three words, and so do three stores of
// lanes 0, 1, 2 (lane 0 two, lane 1 one): whole words, no bytes that a partly written sector would have to be read for.
// `next` are the low codes of the next lane.
//
//     3 bits   | w0 w0 w0 w1 | w1 w1 w2 w2 | w2 w3 w3 w3 |        w: the 3 bytes of a lane
template <int BITS, bool ALIGNED>
WANTRAIN_BOTH void store_codes(u8* codes, const Place& place, bool are_quads_whole, Codes own, u32 next) {
  u8* to = codes + place.octet * BITS;
  if constexpr (ALIGNED && BITS == 8) {
    *reinterpret_cast<Codes*>(to) = own;
  } else if constexpr (ALIGNED && BITS == 4) {
    *reinterpret_cast<u32*>(to) = own.low;
  } else if constexpr (ALIGNED && BITS == 2) {
    *reinterpret_cast<u16*>(to) = static_cast<u16>(own.low);
  } else if constexpr (ALIGNED && BITS == 6) {
    if (!are_quads_whole) return store_code_bytes<BITS>(to, own);
    if (place.octet % 2) {
      *reinterpret_cast<u32*>(to + 2) = own.low >> 16 | own.high << 16;
    } else {
      reinterpret_cast<u32*>(to)[0] = own.low;
      reinterpret_cast<u32*>(to)[1] = own.high | next << 16;
    }
  } else if constexpr (ALIGNED && BITS == 3) {
    if (!are_quads_whole) return store_code_bytes<BITS>(to, own);
    int lane = static_cast<int>(place.octet % 4);
    if (lane < 3) *reinterpret_cast<u32*>(to + lane) = own.low >> (8 * lane) | next << (24 - 8 * lane);
  } else {
    store_code_bytes<BITS>(to, own);
  }
}

}  // namespace wantrain
