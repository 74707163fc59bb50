"""Where a group lies in bodies and stored messages, and how it is read, written and rotated, for the CPU backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wantrain_kernels.cpu_bits import (
    BF16,
    FP16,
    Q4,
    Q8,
    SPOT_STEP,
    beyond,
    bf16_of,
    bits_of,
    float_of,
    fp16_of,
    load_f32,
    load_u8,
    load_u16,
    of_bf16,
    random32,
    share,
    spot_of,
    store_f32,
    store_u16,
)
from wantrain_kernels.cpu_jit import compiled
from wantrain_kernels.cpu_loops import (
    LEAST_BITS,
    Levels,
    fetch,
    fill,
    greatest_bits,
    levels_to_values,
    pack,
    quantize_group,
    unpack,
)

_GREATEST_BF16 = np.int32(0x7F7F0000)
_GREATEST_FP16 = np.int32(0x477FE000)


class Rows(NamedTuple):
    """How a tensor divides into groups."""

    rows: int
    row_length: int
    group_size: int


class Body(NamedTuple):
    """Where the codes of a body lie, and what they mean."""

    scales_bytes: int
    row_code_bytes: int
    levels: Levels


class Base(NamedTuple):
    """How a message is stored: `form` BF16 or FP16, or as the codes of `body`."""

    form: int
    body: Body


class Group(NamedTuple):
    """One group: its number, its row and where in the row it begins, its place in the tensor, how many values."""

    number: int
    row: int
    begin: int
    place: int
    size: int


@compiled
def first_group(rows: Any) -> Any:
    return Group(0, 0, 0, 0, min(rows.group_size, rows.row_length))


@compiled
def next_group(group: Any, rows: Any) -> Any:
    """Return the group that follows; its row is `rows.rows` after the last one."""
    row, begin = group.row, group.begin + group.size
    if begin == rows.row_length:
        row, begin = row + 1, 0
    return Group(group.number + 1, row, begin, group.place + group.size, min(rows.group_size, rows.row_length - begin))


@compiled
def codes_of(group: Any, body: Any, data: Any) -> Any:
    """Return a pointer to a group's codes."""
    return beyond(data, body.scales_bytes + group.row * body.row_code_bytes + (group.begin >> 3) * body.levels.bits)


@compiled
def put_codes(group: Any, codes: Any, scale: Any, body: Any, data: Any) -> None:
    store_u16(data, group.number, scale)
    pack(codes, (group.size + 7) >> 3, body.levels.bits, codes_of(group, body, data))


@compiled
def take_values(group: Any, body: Any, data: Any, codes: Any, values: Any) -> Any:
    """Read a group's codes and values; return its scale."""
    scale = load_u16(data, group.number)
    unpack(codes_of(group, body, data), (group.size + 7) >> 3, body.levels.bits, codes)
    levels_to_values(codes, group.size, scale, body.levels.offset, body.levels.bias, values)
    return scale


@compiled
def load_message(group: Any, base: Any, data: Any, codes: Any, values: Any) -> None:
    """Read a group of a stored message."""
    if base.form == BF16 or base.form == FP16:
        fetch(data, base.form, group.place, group.size, values)
    else:
        take_values(group, base.body, data, codes, values)


@compiled
def store_message(group: Any, base: Any, values: Any, codes: Any, data: Any) -> Any:
    """Write finite values as a group of a stored message; return the group's part of the digest."""
    if base.form == BF16:
        return _store_bf16(values, group, data)
    if base.form == FP16:
        return _store_fp16(values, group, data)
    for i in range(group.size):
        store_f32(values, i, float_of(_limited(bits_of(load_f32(values, i)), _GREATEST_BF16)))
    greatest = greatest_bits(values, group.size)
    scale = quantize_group(values, greatest, group.size, group.place, base.body.levels, codes)
    put_codes(group, codes, scale, base.body, data)
    return digest_of_codes(group, codes, scale)


@compiled
def _limited(bits: Any, greatest: Any) -> Any:
    """Return float bits with their magnitude at most `greatest`."""
    return np.int32(min(np.int32(bits & 0x7FFFFFFF), greatest) | np.int32(bits & np.int32(-0x80000000)))


@compiled
def _settled(bits: Any, greatest: Any) -> Any:
    """Return float bits limited to `greatest`, and zero where they are below the least magnitude that is kept."""
    limited = _limited(bits, greatest)
    return limited if np.int32(limited & 0x7FFFFFFF) >= LEAST_BITS else np.int32(0)


@compiled
def _store_bf16(values: Any, group: Any, data: Any) -> Any:
    digest, spot = np.uint32(0), spot_of(group.place)
    for i in range(group.size):
        half = bf16_of(_settled(bits_of(load_f32(values, i)), _GREATEST_BF16))
        store_u16(data, group.place + i, half)
        digest, spot = np.uint32(digest + share(half, spot)), np.uint32(spot + SPOT_STEP)
    return digest


@compiled
def _store_fp16(values: Any, group: Any, data: Any) -> Any:
    digest, spot = np.uint32(0), spot_of(group.place)
    for i in range(group.size):
        half = fp16_of(_settled(bits_of(load_f32(values, i)), _GREATEST_FP16))
        store_u16(data, group.place + i, half)
        digest, spot = np.uint32(digest + share(half, spot)), np.uint32(spot + SPOT_STEP)
    return digest


@compiled
def digest_of_codes(group: Any, codes: Any, scale: Any) -> Any:
    digest, spot = share(scale, spot_of(group.number + 2**31)), spot_of(group.place)
    for i in range(group.size):
        digest, spot = np.uint32(digest + share(load_u8(codes, i), spot)), np.uint32(spot + SPOT_STEP)
    return digest


@compiled
def digest_of_halves(group: Any, data: Any) -> Any:
    digest, spot = np.uint32(0), spot_of(group.place)
    for i in range(group.size):
        half = load_u16(data, group.place + i)
        digest, spot = np.uint32(digest + share(half, spot)), np.uint32(spot + SPOT_STEP)
    return digest


@compiled
def advance(codes: Any, scale: Any, levels: Any, m: Any, y: Any, kept: Any, count: Any) -> None:
    """Write y = m + (q + o)·s, and to `kept` what is to be stored: y, or m where y is NaN.

    Were `kept` the memory of m, the compiler would write y alone under a mask, and what was written under a mask can be
    read again only dozens of cycles later: half the speed (measured).
    """
    offset, bias, factor = np.float32(levels.offset), np.int32(levels.bias), of_bf16(scale)
    for i in range(count):
        before = load_f32(m, i)
        after = before + (np.float32(np.int32(np.int32(load_u8(codes, i)) - bias)) + offset) * factor
        store_f32(y, i, after)
        store_f32(kept, i, before if np.isnan(after) else after)


@compiled
def rotate(values: Any, size: Any) -> None:
    """Rotate a group by the Walsh–Hadamard matrix, in the order of additions that `reference` has."""
    distance = 1
    while distance < size:
        for begin in range(0, size, 2 * distance):
            for i in range(begin, begin + distance):
                a, b = load_f32(values, i), load_f32(values, i + distance)
                store_f32(values, i, a + b)
                store_f32(values, i + distance, a - b)
        distance *= 2
    factor = np.float32(1.0 / np.sqrt(np.float64(size)))
    for i in range(size):
        store_f32(values, i, load_f32(values, i) * factor)


@compiled
def turn(values: Any, signs: Any, size: Any) -> None:
    for i in range(size):
        store_f32(values, i, load_f32(values, i) * load_f32(signs, i))


@compiled
def write_signs(key_low: Any, key_high: Any, size: Any, signs: Any) -> None:
    """Write ±1 for each place in a group."""
    for i in range(size):
        sign = np.int32(random32(key_low, key_high, np.uint32(i)) >> 31)
        store_f32(signs, i, np.float32(np.int32(1 - 2 * sign)))


@compiled
def finish_body(group: Any, body: Any, data: Any) -> None:
    """Write the zero bytes between scales and codes; `group` is the one after the last."""
    fill(data, 2 * group.number, body.scales_bytes, 0)


@compiled
def finish_message(group: Any, base: Any, data: Any) -> None:
    if base.form == Q8 or base.form == Q4:
        finish_body(group, base.body, data)
