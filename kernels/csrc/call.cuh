// The C interface: what Python hands over, and where the octets of such a tensor lie.
#pragma once

#include "codes.cuh"

namespace wantrain {

// One operation. `cuda_ops.py` declares the same fields in the same order; all pointers are the device's.
struct Call {
  const void* x;        // values to encode, of `value_type`, contiguous
  void* base;           // 16-bit values of `base_type`, read and written; null for the direct operations
  u8* body;             // written by encode, read by decode
  void* y;              // what decode writes, of `value_type`
  i64* digest;          // one number; null for the direct operations
  u64* scratch;         // zero, and zero again afterwards; one per stream, see `Tally`
  void* stream;
  i64 rows, row_length;
  u64 key;
  int bits, group_size, value_type, base_type, is_stochastic, is_saturating, device;
};

constexpr int WARP = 32;
constexpr int NUM_THREADS = 256;

struct Place {
  bool is_there;
  int count;     // values that are there: 1 to 8
  i64 group;     // its number among the body's scales
  i64 octet;     // its number among the body's codes
  i64 value;     // the first value's number in the tensor
};

// Threads are dealt to groups: lane l of a group's `lanes` takes its octet l, also where a row's last group is short,
// and some lanes have nothing. So a group never leaves a warp, thread t serves group t / lanes, and
//
//     row = t / lanes_per_row,    octet in the row o = t mod lanes_per_row (there if o < octets_per_row)
//
// Rows of whole groups are one long row. The division is a multiplication: for t < 2^31, with 2^(l−1) < d ≤ 2^l,
// t / d = t · (⌊2^(31+l) / d⌋ + 1) >> 31 + l (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", 1994, theorem 4.2).
struct Geometry {
  i64 num_threads, rows, row_length, octets_per_row, lanes_per_row, scales_bytes, num_groups;
  int lanes_shift;  // a group has 1 << lanes_shift lanes
  u32 multiplier;
  int shift;
  bool are_quads_whole;  // four lanes in a row that begin at a multiple of 4 hold adjacent octets

  // Return the place of a thread where all octets are whole and there are fewer than 2^31 threads.
  WANTRAIN_BOTH Place whole_place(u32 thread) const {
#ifdef __CUDA_ARCH__
    u32 row = __umulhi(thread, multiplier) >> shift;
#else
    u32 row = static_cast<u32>(u64{thread} * multiplier >> 32) >> shift;
#endif
    u32 lanes = static_cast<u32>(lanes_per_row), octets = static_cast<u32>(octets_per_row);
    u32 octet = thread - row * (lanes - octets);
    bool is_there = thread < static_cast<u32>(num_threads) && thread - row * lanes < octets;
    return {is_there, OCTET, thread >> lanes_shift, octet, i64{octet} * OCTET};
  }

  // Return the place of any thread of any tensor.
  WANTRAIN_BOTH Place any_place(i64 thread) const {
    i64 row = thread / lanes_per_row, octet = thread % lanes_per_row;
    i64 left = row_length - octet * OCTET;
    bool is_there = thread < num_threads && octet < octets_per_row;
    return {is_there, static_cast<int>(left < OCTET ? left : OCTET), thread >> lanes_shift,
            row * octets_per_row + octet, row * row_length + octet * OCTET};
  }
};

// What a kernel is started with.
struct Job {
  Call call;
  Geometry at;
  u8* codes;
  float factor;
  u32 key_low, key_high;
};

inline Geometry geometry_of(const Call& call) {
  Geometry at{};
  i64 group_size = call.group_size, groups_per_row = (call.row_length + group_size - 1) / group_size;
  at.num_groups = call.rows * groups_per_row;
  at.scales_bytes = (at.num_groups * 2 + 15) / 16 * 16;
  while (OCTET << at.lanes_shift < group_size) ++at.lanes_shift;
  bool is_one_row = call.row_length % group_size == 0;
  at.rows = is_one_row ? 1 : call.rows;
  at.row_length = is_one_row ? call.rows * call.row_length : call.row_length;
  at.octets_per_row = (at.row_length + OCTET - 1) / OCTET;
  at.num_threads = at.num_groups << at.lanes_shift;
  at.lanes_per_row = at.num_threads / at.rows;
  at.are_quads_whole = at.octets_per_row % 4 == 0;
  if (at.rows > 1 && at.num_threads < i64{1} << 31) {
    int l = 0;
    while (i64{1} << l < at.lanes_per_row) ++l;
    at.multiplier = static_cast<u32>((u64{1} << (31 + l)) / static_cast<u64>(at.lanes_per_row) + 1);
    at.shift = l - 1;
  }
  return at;
}

inline Job job_of(const Call& call) {
  Geometry at = geometry_of(call);
  float factor = scale_factor(call.bits, call.is_stochastic);
  return {call, at, call.body + at.scales_bytes, factor, static_cast<u32>(call.key), static_cast<u32>(call.key >> 32)};
}

// Say whether 16 bytes at a time is right: whole octets, and rows and tensors that begin at multiples of 16 bytes.
inline bool is_aligned(const Job& job) {
  auto is_multiple = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  const Call& call = job.call;
  return call.row_length % OCTET == 0 && job.at.num_threads < i64{1} << 31 && is_multiple(call.x) &&
         is_multiple(call.base) && is_multiple(call.body) && is_multiple(call.y);
}

}  // namespace wantrain
