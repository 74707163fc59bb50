"""What happens to one group of values, for the CPU backend: fetch, scale, round, pack, and the way back.

A group lies in scratch arrays of a few hundred bytes, which stay in the first-level cache: `values` and `base` (fp32),
`codes` (a byte each). So every step is a short loop over one array that LLVM vectorizes, and memory is read and written
once. The size of a group is a run-time number on purpose: for 128 as a constant LLVM unrolled the loops into scalar
code at 0.37 of the speed (numba 0.68, measured).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wantrain_kernels.cpu_bits import (
    BF16,
    FP32,
    beyond,
    bf16_of,
    bits_of,
    float_of,
    fp16_of,
    load_f32,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    of_bf16,
    of_fp16,
    random32,
    spread,
    squeeze,
    store_f32,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from wantrain_kernels.cpu_jit import compiled

NAN_SCALE = np.uint16(0x7FC0)
INFINITY_BITS = np.int32(0x7F800000)
LEAST_BITS = np.int32((127 - 100) << 23)
MOST_SCALE = np.float32(2.0**125)
_MAGIC = np.float32(1.5 * 2**23)
"""Added to a number below 2^22 it leaves the number, rounded to nearest even, in the last bits of the sum."""


class Levels(NamedTuple):
    """How values become codes: see `reference`."""

    bits: int
    offset: np.float32
    bias: int
    greatest: int
    factor: np.float32
    is_stochastic: bool
    key_low: np.uint32
    key_high: np.uint32
    saturate: bool


@compiled
def fetch(data: Any, form: Any, first: Any, count: Any, values: Any) -> Any:
    """Read `count` values that lie in memory as fp32, bf16 or fp16; return the bits of the greatest magnitude.

    As integers magnitudes have no order of evaluation, and NaN is above infinity above all else.
    """
    greatest = np.int32(0)
    if form == FP32:
        for i in range(count):
            greatest = _put(values, i, load_f32(data, first + i), greatest)
    elif form == BF16:
        for i in range(count):
            greatest = _put(values, i, of_bf16(load_u16(data, first + i)), greatest)
    else:
        for i in range(count):
            greatest = _put(values, i, of_fp16(load_u16(data, first + i)), greatest)
    return greatest


@compiled
def fetch_delta(data: Any, form: Any, first: Any, count: Any, m: Any, values: Any) -> Any:
    """Like `fetch`, less what `m` holds."""
    greatest = np.int32(0)
    if form == FP32:
        for i in range(count):
            greatest = _put(values, i, load_f32(data, first + i) - load_f32(m, i), greatest)
    elif form == BF16:
        for i in range(count):
            greatest = _put(values, i, of_bf16(load_u16(data, first + i)) - load_f32(m, i), greatest)
    else:
        for i in range(count):
            greatest = _put(values, i, of_fp16(load_u16(data, first + i)) - load_f32(m, i), greatest)
    return greatest


@compiled
def _put(values: Any, i: Any, value: Any, greatest: Any) -> Any:
    store_f32(values, i, value)
    return np.int32(max(greatest, np.int32(bits_of(value) & 0x7FFFFFFF)))


@compiled
def spill(values: Any, form: Any, first: Any, count: Any, data: Any) -> None:
    """Write `count` values to memory as fp32, bf16 or fp16."""
    if form == FP32:
        for i in range(count):
            store_f32(data, first + i, load_f32(values, i))
    elif form == BF16:
        for i in range(count):
            store_u16(data, first + i, bf16_of(bits_of(load_f32(values, i))))
    else:
        for i in range(count):
            store_u16(data, first + i, fp16_of(bits_of(load_f32(values, i))))


@compiled
def greatest_bits(values: Any, count: Any) -> Any:
    """Return the greatest |value| as bits: integers need no order, and NaN is above infinity above all else."""
    greatest = np.int32(0)
    for i in range(count):
        greatest = np.int32(max(greatest, np.int32(bits_of(load_f32(values, i)) & 0x7FFFFFFF)))
    return greatest


@compiled
def bound(values: Any, count: Any) -> Any:
    """Replace NaN by 0 and infinities by the greatest finite magnitude; return that as bits."""
    greatest = np.int32(0)
    for i in range(count):
        magnitude = np.int32(bits_of(load_f32(values, i)) & 0x7FFFFFFF)
        greatest = np.int32(max(greatest, magnitude if magnitude < INFINITY_BITS else 0))
    for i in range(count):
        magnitude = np.int32(bits_of(load_f32(values, i)) & 0x7FFFFFFF)
        if magnitude > INFINITY_BITS:
            store_f32(values, i, np.float32(0))
        elif magnitude == INFINITY_BITS:
            value = float_of(greatest) if load_f32(values, i) > 0 else -float_of(greatest)
            store_f32(values, i, value)
    return greatest


@compiled
def scale_of(greatest: Any, factor: Any) -> Any:
    """Return the scale (bf16 bits) of a group whose greatest magnitude is finite."""
    scale = min(float_of(greatest) * factor, MOST_SCALE)
    return bf16_of(bits_of(scale)) if bits_of(scale) >= LEAST_BITS else np.uint16(0)


@compiled
def quantize_group(values: Any, greatest: Any, count: Any, place: Any, levels: Any, codes: Any) -> Any:
    """Make codes of `count` values, the first of which is at `place` in the tensor; return the scale's bits.

    Codes 0 follow up to the end of the last octet.
    """
    if greatest >= INFINITY_BITS and levels.saturate:
        greatest = bound(values, count)
    fill(codes, count & -8, (count + 7) & -8, 0)
    if greatest >= INFINITY_BITS:
        fill(codes, 0, count, 0)
        return NAN_SCALE
    scale = scale_of(greatest, levels.factor)
    if scale == 0:
        fill(codes, 0, count, levels.bias)
    elif levels.is_stochastic:
        round_stochastic(values, count, place, np.float32(1) / of_bf16(scale), levels, codes)
    else:
        round_nearest(values, count, np.float32(1) / of_bf16(scale), levels, codes)
    return scale


@compiled
def round_nearest(values: Any, count: Any, inverse: Any, levels: Any, codes: Any) -> None:
    """Write clamp(rint(x·inverse − o)) as codes."""
    offset, zero, most = np.float32(levels.offset), _zero(levels), np.int32(levels.greatest + levels.bias)
    for i in range(count):
        code = np.int32(bits_of((load_f32(values, i) * inverse - offset) + _MAGIC) - zero)
        store_u8(codes, i, np.uint8(min(max(code, np.int32(0)), most)))


@compiled
def round_stochastic(values: Any, count: Any, place: Any, inverse: Any, levels: Any, codes: Any) -> None:
    """Write clamp(floor((x·inverse − o) + u)) as codes, u from the key and the place of the value."""
    offset, zero, most = np.float32(levels.offset), _zero(levels), np.int32(levels.greatest + levels.bias)
    first, low, high = np.uint32(place), np.uint32(levels.key_low), np.uint32(levels.key_high)
    for i in range(count):
        random = random32(low, high, np.uint32(first + np.uint32(i)))
        u = np.float32(np.int32((random >> 8) | 1)) * np.float32(2.0**-24)
        v = (load_f32(values, i) * inverse - offset) + u
        shifted = v + _MAGIC
        code = np.int32(np.int32(bits_of(shifted) - zero) - np.int32(shifted - _MAGIC > v))
        store_u8(codes, i, np.uint8(min(max(code, np.int32(0)), most)))


@compiled
def _zero(levels: Any) -> Any:
    """Return the bits of the sum with _MAGIC that stand for code 0."""
    return np.int32(bits_of(_MAGIC) - np.int32(levels.bias))


@compiled
def levels_to_values(codes: Any, count: Any, scale: Any, offset: Any, bias: Any, values: Any) -> None:
    """Write (q + o)·s."""
    shift, factor = np.float32(offset), of_bf16(scale)
    for i in range(count):
        q = np.float32(np.int32(np.int32(load_u8(codes, i)) - np.int32(bias)))
        store_f32(values, i, (q + shift) * factor)


@compiled
def fill(codes: Any, first: Any, end: Any, code: Any) -> None:
    """Set codes from `first` to before `end`."""
    for i in range(first, end):
        store_u8(codes, i, np.uint8(code))


@compiled
def pack(codes: Any, num_octets: Any, bits: Any, out: Any) -> None:
    """Write octets of codes densely."""
    if bits == 4:
        for i in range(num_octets):
            store_u32(out, i, np.uint32(squeeze(codes, i, 4)))
    elif bits == 8:
        for i in range(num_octets):
            store_u64(out, i, load_u64(codes, i))
    elif bits == 2:
        for i in range(num_octets):
            store_u16(out, i, np.uint16(squeeze(codes, i, 2)))
    elif bits == 3:
        for i in range(num_octets):
            word = squeeze(codes, i, 3)
            store_u16(beyond(out, 3 * i), 0, np.uint16(word))
            store_u8(out, 3 * i + 2, np.uint8(word >> np.uint64(16)))
    else:
        for i in range(num_octets):
            word = squeeze(codes, i, 6)
            store_u16(out, 3 * i, np.uint16(word))
            store_u16(out, 3 * i + 1, np.uint16(word >> np.uint64(16)))
            store_u16(out, 3 * i + 2, np.uint16(word >> np.uint64(32)))


@compiled
def unpack(data: Any, num_octets: Any, bits: Any, codes: Any) -> None:
    """Read octets of codes."""
    if bits == 4:
        for i in range(num_octets):
            store_u64(codes, i, spread(load_u32(data, i), 4))
    elif bits == 8:
        for i in range(num_octets):
            store_u64(codes, i, load_u64(data, i))
    elif bits == 2:
        for i in range(num_octets):
            store_u64(codes, i, spread(load_u16(data, i), 2))
    elif bits == 3:
        for i in range(num_octets):
            high = np.uint64(load_u8(data, 3 * i + 2))
            store_u64(codes, i, spread(load_u16(beyond(data, 3 * i), 0) | (high << np.uint64(16)), 3))
    else:
        for i in range(num_octets):
            low, high = np.uint64(load_u32(beyond(data, 6 * i), 0)), np.uint64(load_u16(data, 3 * i + 2))
            store_u64(codes, i, spread(low | (high << np.uint64(32)), 6))
