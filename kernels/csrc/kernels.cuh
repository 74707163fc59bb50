// The two kernels, encode and decode, with and without a base. One pass: what a thread loads it needs once.
//
// A warp runs `run` for NUM_OCTETS octets per lane. All steps of all lanes go as lambdas through `Warp::each`, and what
// passes between lanes goes through Warp's other functions; so a warp can as well be a loop over 32 lanes on the host
// (`tests/kernels/cuda_host/`), and this very text is tested without a GPU.
//
//     encode   load x (and m) ─► greatest magnitude of own octet ─► over the group's lanes ─► scale ─► codes ─► store
//                                                                                               └─► m′, digest
//     decode   load codes, scale (and m) ─► values, y, m′, digest ─► store
#pragma once

#include "octets.cuh"

namespace wantrain {

template <int SIZE>
struct Row {
  u32 of[SIZE];
};

template <bool ALIGNED>
WANTRAIN_BOTH u32 load_scale(const u8* body, i64 group) {
  if constexpr (ALIGNED) return reinterpret_cast<const u16*>(body)[group];
  else return body[2 * group] | u32{body[2 * group + 1]} << 8;
}

// Store zeros between the last scale and the codes; for the first lanes of the grid.
WANTRAIN_BOTH void pad_scales(u8* body, const Geometry& at, int lane) {
  i64 scale = at.num_groups + lane;
  if (scale < at.scales_bytes / 2) reinterpret_cast<u16*>(body)[scale] = 0;
}

// A thread's number: where octets are whole there are fewer than 2^31.
template <bool ALIGNED>
using ThreadOf = std::conditional_t<ALIGNED, u32, i64>;

template <bool ALIGNED>
WANTRAIN_BOTH Place place_of(const Geometry& at, ThreadOf<ALIGNED> thread) {
  if constexpr (ALIGNED) return at.whole_place(thread);
  else return at.any_place(thread);
}

// Turn y into what is stored of it. With a base in its stored form and a scale s ≥ 2^-90, y is so already: (q + o)·s is
// 0, or a multiple of 2^-98 and at least 2^-91; where m all but cancels it, m is as large, so a multiple of 2^-99. So y
// is 0, at least 2^-99, or m itself; and a sum that is 0 is +0.
WANTRAIN_BOTH void make_storable(float (&y)[OCTET], const float (&m)[OCTET], float scale) {
  if (scale >= SAFE_SCALE && scale <= MOST_SCALE) return;
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) y[i] = storable(y[i], m[i]);
}

// Store m′; return its part of the digest.
template <Type M, bool ALIGNED>
WANTRAIN_BOTH u32 store_base(const Job& job, const Place& place, float (&y)[OCTET], const Octet<M>& base, float scale) {
  float m[OCTET];
  WANTRAIN_UNROLL
  for (int i = 0; i < OCTET; ++i) m[i] = base[i];
  make_storable(y, m, scale);
  Octet<M> stored = octet_of<M, true>(y);
  store_octet<M, ALIGNED>(job.call.base, place, stored);
  return digest_of<M, ALIGNED>(stored, place);
}

template <int BITS, Type X, Type M, bool STOCHASTIC, bool ALIGNED>
struct Encode {
  using Thread = ThreadOf<ALIGNED>;
  static constexpr bool IS_DELTA = M != NOTHING;
  // Chosen: with 1024 threads on a multiprocessor, 64 KiB of loads under way (32 KiB piece by piece).
  static constexpr int NUM_OCTETS = !ALIGNED ? 1 : IS_DELTA || X == FLOAT32 ? 2 : 4;
  using Base = Octet<IS_DELTA ? M : BFLOAT16>;
  using Greatest = Row<NUM_OCTETS>;

  struct Lane {
    Place place[NUM_OCTETS];
    Octet<X> x[NUM_OCTETS];
    Base base[NUM_OCTETS];
    Codes codes[NUM_OCTETS];

    // Get the values to quantize of an octet, again: from registers.
    WANTRAIN_BOTH void values_of(int u, float (&values)[OCTET]) const {
      WANTRAIN_UNROLL
      for (int i = 0; i < OCTET; ++i) {
        values[i] = x[u][i];
        if constexpr (IS_DELTA) values[i] = subtract(values[i], base[u][i]);
      }
    }
  };

  template <class Warp>
  static WANTRAIN_BOTH void run(const Job& job, Warp& warp, Thread first, typename Warp::template Lanes<u32>& digest) {
    typename Warp::template Lanes<Lane> lanes;
    typename Warp::template Lanes<Greatest> greatest;
    warp.each([&](int lane) {
      load_values(job, first + lane, lanes[lane]);
      find_greatest(lanes[lane], greatest[lane]);
      if (first == 0) pad_scales(job.call.body, job.at, lane);
    });
    warp.group_max(greatest, 1 << job.at.lanes_shift);
    if (job.call.is_saturating) leave_out_infinite(job, warp, lanes, greatest);
    warp.each([&](int lane) {
      WANTRAIN_UNROLL
      for (int u = 0; u < NUM_OCTETS; ++u) {
        digest[lane] += encode_octet(job, lane, lanes[lane], u, greatest[lane].of[u]);
      }
    });
    store_all_codes(job, warp, lanes, greatest);
  }

  static WANTRAIN_BOTH void load_values(const Job& job, Thread thread, Lane& lane) {
    WANTRAIN_UNROLL
    for (int u = 0; u < NUM_OCTETS; ++u) {
      lane.place[u] = place_of<ALIGNED>(job.at, thread + u * NUM_THREADS);
      lane.x[u] = load_octet<X, ALIGNED, true>(job.call.x, lane.place[u]);
      if constexpr (IS_DELTA) lane.base[u] = load_octet<M, ALIGNED, false>(job.call.base, lane.place[u]);
    }
  }

  static WANTRAIN_BOTH void find_greatest(const Lane& lane, Greatest& greatest) {
    WANTRAIN_UNROLL
    for (int u = 0; u < NUM_OCTETS; ++u) {
      if constexpr (!IS_DELTA && X != FLOAT32) {
        greatest.of[u] = lane.x[u].greatest();
      } else {
        float values[OCTET], most = 0.0f;
        lane.values_of(u, values);
        WANTRAIN_UNROLL
        for (int i = 0; i < OCTET; ++i) most = greater_magnitude(most, values[i]);
        greatest.of[u] = bits_of(most);
      }
    }
  }

  // Where a group has NaN or infinity, replace its greatest magnitude by the greatest finite one.
  template <class Warp>
  static WANTRAIN_BOTH void leave_out_infinite(const Job& job, Warp& warp, typename Warp::template Lanes<Lane>& lanes,
                                               typename Warp::template Lanes<Greatest>& greatest) {
    typename Warp::template Lanes<bool> is_needed;
    warp.each([&](int lane) {
      is_needed[lane] = false;
      for (int u = 0; u < NUM_OCTETS; ++u) is_needed[lane] |= greatest[lane].of[u] >= INFINITE;
    });
    if (!warp.any(is_needed)) return;
    warp.each([&](int lane) {
      WANTRAIN_UNROLL
      for (int u = 0; u < NUM_OCTETS; ++u) {
        float values[OCTET];
        lanes[lane].values_of(u, values);
        greatest[lane].of[u] = greatest_finite(values);
      }
    });
    warp.group_max(greatest, 1 << job.at.lanes_shift);
  }

  // Make the codes of one octet, and store the group's scale and m′; return what m′ adds to the digest.
  static WANTRAIN_BOTH u32 encode_octet(const Job& job, int number, Lane& lane, int u, u32 greatest) {
    const Place& place = lane.place[u];
    Scale scale = scale_of(greatest, job.factor);
    float values[OCTET];
    lane.values_of(u, values);
    if (job.call.is_saturating) bound(values, float_of(greatest));
    scale_octet<BITS, STOCHASTIC>(values, scale, {job.key_low, job.key_high, static_cast<u32>(place.value)});
    float sums[OCTET];
    if constexpr (IS_DELTA) {
      round_octet<BITS, STOCHASTIC>(values, sums);
      lane.codes[u] = codes_of<BITS>(sums);
    } else {
      lane.codes[u] = rounded_codes_of<BITS, STOCHASTIC>(values);
    }
    if (!scale.is_finite) lane.codes[u] = {0, 0};
    if (!place.is_there) return 0;
    if ((number & ((1 << job.at.lanes_shift) - 1)) == 0) {
      reinterpret_cast<u16*>(job.call.body)[place.group] = static_cast<u16>(scale.bits);
    }
    if constexpr (IS_DELTA) return move_base(job, place, sums, lane.base[u], scale.value);
    return 0;
  }

  // Store m′ = m + (q + o)·s; return its part of the digest.
  static WANTRAIN_BOTH u32 move_base(const Job& job, const Place& place, const float (&sums)[OCTET], const Base& base,
                                     float scale) {
    float y[OCTET];
    WANTRAIN_UNROLL
    for (int i = 0; i < OCTET; ++i) {
      float level = add(subtract(sums[i], ROUNDER), Levels<BITS>::OFFSET);
      y[i] = add(base[i], multiply(level, scale));
    }
    return store_base<M, ALIGNED>(job, place, y, base, scale);
  }

  template <class Warp>
  static WANTRAIN_BOTH void store_all_codes(const Job& job, Warp& warp, typename Warp::template Lanes<Lane>& lanes,
                                            typename Warp::template Lanes<Greatest>& next) {
    if constexpr (ALIGNED && BITS % 3 == 0) {
      warp.each([&](int lane) {
        WANTRAIN_UNROLL
        for (int u = 0; u < NUM_OCTETS; ++u) next[lane].of[u] = lanes[lane].codes[u].low;
      });
      warp.take_from_next(next);
    }
    warp.each([&](int lane) {
      WANTRAIN_UNROLL
      for (int u = 0; u < NUM_OCTETS; ++u) {
        const Place& place = lanes[lane].place[u];
        if (!place.is_there) continue;
        Codes codes = lanes[lane].codes[u];
        if (!ALIGNED) codes = first_codes<BITS>(codes, place.count);
        store_codes<BITS, ALIGNED>(job.codes, place, job.at.are_quads_whole, codes, next[lane].of[u]);
      }
    });
  }
};

template <int BITS, Type Y, Type M, bool ALIGNED>
struct Decode {
  using Thread = ThreadOf<ALIGNED>;
  static constexpr bool IS_DELTA = M != NOTHING;
  static constexpr int NUM_OCTETS = ALIGNED ? 4 : 1;
  using Base = Octet<IS_DELTA ? M : BFLOAT16>;

  template <class Warp>
  static WANTRAIN_BOTH void run(const Job& job, Warp& warp, Thread first, typename Warp::template Lanes<u32>& digest) {
    warp.each([&](int lane) { digest[lane] += decode(job, first + lane); });
  }

  static WANTRAIN_BOTH u32 decode(const Job& job, Thread thread) {
    Place place[NUM_OCTETS];
    Codes codes[NUM_OCTETS]{};
    u32 scales[NUM_OCTETS]{};
    Base base[NUM_OCTETS];
    WANTRAIN_UNROLL
    for (int u = 0; u < NUM_OCTETS; ++u) {
      place[u] = place_of<ALIGNED>(job.at, thread + u * NUM_THREADS);
      if constexpr (IS_DELTA) base[u] = load_octet<M, ALIGNED, false>(job.call.base, place[u]);
      if (!place[u].is_there) continue;
      codes[u] = load_codes<BITS, ALIGNED>(job.codes, place[u].octet);
      scales[u] = load_scale<ALIGNED>(job.call.body, place[u].group);
    }
    u32 digest = 0;
    WANTRAIN_UNROLL
    for (int u = 0; u < NUM_OCTETS; ++u) {
      if (place[u].is_there) digest += decode_octet(job, place[u], codes[u], float_of(scales[u] << 16), base[u]);
    }
    return digest;
  }

  static WANTRAIN_BOTH u32 decode_octet(const Job& job, const Place& place, Codes codes, float scale,
                                        const Base& base) {
    float y[OCTET];
    WANTRAIN_UNROLL
    for (int i = 0; i < OCTET; ++i) {
      y[i] = multiply(level_of<BITS>(codes, i), scale);
      if constexpr (IS_DELTA) y[i] = add(base[i], y[i]);
    }
    store_octet<Y, ALIGNED>(job.call.y, place, octet_of<Y, false>(y));
    if constexpr (IS_DELTA) return store_base<M, ALIGNED>(job, place, y, base, scale);
    return 0;
  }
};

}  // namespace wantrain
