"""Where a tile's values, codes and scales lie in memory, and how they are read and written: see `layout` for the bytes.

A thread has an octet's eight values, so values move 16 bytes at a time and an octet's codes as one word of 2, 4 or 8
bytes; 3 and 6 bits take three accesses, which the caches join. A tile's `place` is, per group,

    group   its number
    octet   the number of its first octet, counted as octets lie in the codes, 64 bits
    begin   the place in the tensor of its first value, 64 bits
    room    how many values are left in the row from there on; 0 for a group that does not exist

Memory is addressed as [groups, values] and values are computed on as [groups, octets, 8]: the compiler then gives a
warp 512 bytes in a row, which with three dimensions not every version of Triton does (3.6).
"""

import triton
import triton.language as tl

from wantrain_kernels import reference
from wantrain_kernels.layout import BASE_BITS
from wantrain_kernels.triton_blocks import (
    LEAST,
    WEIGHT,
    code_values,
    digest_of,
    odd32,
    pack,
    round_levels,
    scale_of,
    to_bf16_bits,
    to_fp32,
    unpack,
)

_GREATEST = dict(reference.GREATEST)
_BASE_BITS = dict(BASE_BITS)


@triton.constexpr_function
def _greatest(base_format):
    return _GREATEST[base_format]


@triton.constexpr_function
def _base_bits(base_format):
    return _BASE_BITS[base_format]


@triton.jit
def count_groups(rows, row_length, GROUP: tl.constexpr):
    return rows * ((row_length + GROUP - 1) // GROUP)


@triton.jit
def count_tiles(num_groups, TILE: tl.constexpr):
    """Return how many tiles have a scale, those counted that only fill up 16 bytes."""
    return ((num_groups + 7) // 8 * 8 + TILE - 1) // TILE


@triton.jit
def locate(tile, rows, row_length, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's place.

    ROWS says what a row consists of: whole "groups", whole "octets" or any "values"; the less a row may be cut short,
    the less must be masked, and the wider are the loads.
    """
    groups_per_row = (row_length + GROUP - 1) // GROUP
    group = tile * TILE + tl.arange(0, TILE)
    is_there = group < rows * groups_per_row
    if ROWS == "groups":
        octet = group.to(tl.int64) * (GROUP // 8)
        begin = octet * 8
        room = tl.where(is_there, GROUP, 0)
    else:
        octets_per_row = (row_length + 7) // 8
        row = (group // groups_per_row).to(tl.int64)
        column = (group % groups_per_row) * (GROUP // 8)
        octet = row * octets_per_row + column
        if ROWS == "octets":
            begin = octet * 8
            room = tl.where(is_there, octets_per_row - column, 0) * 8
        else:
            begin = row * row_length + column * 8
            room = tl.where(is_there, row_length - column * 8, 0)
    return group, octet, begin, room


@triton.jit
def firsts(place, GROUP: tl.constexpr):
    """Return the place in the tensor of each octet's first value, int64 [g, o]."""
    _, _, begin, _ = place
    return begin[:, None] + (tl.arange(0, GROUP // 8) * 8)[None, :]


@triton.jit
def _octets(place, GROUP: tl.constexpr):
    """Return octets' numbers, and which of them exist."""
    _, octet, _, room = place
    column = tl.arange(0, GROUP // 8)[None, :]
    return octet[:, None] + column, column * 8 < room[:, None]


@triton.jit
def present(place, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return which values exist: [g, o, 8], or alike for an octet or a group."""
    _, _, _, room = place
    if ROWS == "groups":
        mask = (room > 0)[:, None, None]
    elif ROWS == "octets":
        mask = ((tl.arange(0, GROUP // 8) * 8)[None, :] < room[:, None])[:, :, None]
    else:
        column = (tl.arange(0, GROUP // 8) * 8)[:, None] + tl.arange(0, 8)[None, :]
        mask = column[None, :, :] < room[:, None, None]
    return mask


@triton.jit
def _values(place, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return values' places in the tensor, [g, values], and which of them exist."""
    _, _, begin, room = place
    column = tl.arange(0, GROUP)[None, :]
    if ROWS == "groups":
        mask = (room > 0)[:, None]
    else:
        mask = column < room[:, None]
    return begin[:, None] + column, mask


@triton.jit
def load_values(pointer, place, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile [g, o, 8], an octet's eight values in one thread."""
    if ROWS == "values":  # not aligned: one by one
        pointer += firsts(place, GROUP)
        _, _, _, room = place
        room = room[:, None] - (tl.arange(0, GROUP // 8) * 8)[None, :]
        a = tl.join(tl.load(pointer, room > 0, 0), tl.load(pointer + 4, room > 4, 0))
        b = tl.join(tl.load(pointer + 1, room > 1, 0), tl.load(pointer + 5, room > 5, 0))
        c = tl.join(tl.load(pointer + 2, room > 2, 0), tl.load(pointer + 6, room > 6, 0))
        d = tl.join(tl.load(pointer + 3, room > 3, 0), tl.load(pointer + 7, room > 7, 0))
        values = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        offsets, mask = _values(place, GROUP, ROWS)
        values = tl.load(pointer + offsets, mask, 0)
    return tl.reshape(values, [place[0].shape[0], GROUP // 8, 8])


@triton.jit
def store_values(pointer, values, place, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Write a tile [g, o, 8]: fp32 as the pointer's type, rounded to nearest even; or uint16 as it is."""
    offsets, mask = _values(place, GROUP, ROWS)
    if pointer.dtype.element_ty == tl.bfloat16:
        pointer = pointer.to(tl.pointer_type(tl.uint16))
        values = to_bf16_bits(values).to(tl.uint16)
    elif values.dtype != tl.uint16:
        values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets, tl.reshape(values, [place[0].shape[0], GROUP]), mask)


@triton.jit
def _code_pointer(body, num_groups):
    """Return where a body's codes begin: after the scales, padded to 16 bytes."""
    return body + (num_groups.to(tl.int64) + 7) // 8 * 16


@triton.jit
def store_body(body, place, num_groups, scale, low, high, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Write a tile's scales, the zeros after the last of them, and codes.

    A scale is written by the thread of its group's first octet, so that nothing goes through shared memory.
    """
    group, _, _, _ = place
    column = tl.arange(0, GROUP // 8)[None, :]
    octets, mask = _octets(place, GROUP)
    scales = body.to(tl.pointer_type(tl.uint16)) + (group[:, None] + column)
    scale = tl.where(group < num_groups, scale, 0).to(tl.uint16)[:, None]
    has_scale = (group < (num_groups + 7) // 8 * 8)[:, None] & (column == 0)
    tl.store(scales, tl.broadcast_to(scale, octets.shape), has_scale)
    codes = _code_pointer(body, num_groups)
    if BITS == 2:
        tl.store(codes.to(tl.pointer_type(tl.uint16)) + octets, low.to(tl.uint16), mask)
    elif BITS == 3:
        for i in tl.static_range(3):
            tl.store(codes + octets * 3 + i, (low >> (8 * i)).to(tl.uint8), mask)
    elif BITS == 4:
        tl.store(codes.to(tl.pointer_type(tl.uint32)) + octets, low, mask)
    elif BITS == 6:
        words = codes.to(tl.pointer_type(tl.uint16)) + octets * 3
        tl.store(words, low.to(tl.uint16), mask)
        tl.store(words + 1, ((low >> 16) | (high << 8)).to(tl.uint16), mask)
        tl.store(words + 2, (high >> 8).to(tl.uint16), mask)
    else:
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        tl.store(codes.to(tl.pointer_type(tl.uint64)) + octets, both, mask)


@triton.jit
def load_body(body, place, num_groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Return a tile's scales [g] and codes [g, o, 8], uint32."""
    group, _, _, _ = place
    octets, mask = _octets(place, GROUP)
    scale = tl.load(body.to(tl.pointer_type(tl.uint16)) + group, group < num_groups, 0).to(tl.uint32)
    codes = _code_pointer(body, num_groups)
    if BITS == 2:
        low = tl.load(codes.to(tl.pointer_type(tl.uint16)) + octets, mask, 0).to(tl.uint32)
        high = low
    elif BITS == 3:
        low = tl.load(codes + octets * 3, mask, 0).to(tl.uint32)
        low |= tl.load(codes + octets * 3 + 1, mask, 0).to(tl.uint32) << 8
        low |= tl.load(codes + octets * 3 + 2, mask, 0).to(tl.uint32) << 16
        high = low
    elif BITS == 4:
        low = tl.load(codes.to(tl.pointer_type(tl.uint32)) + octets, mask, 0)
        high = low
    elif BITS == 6:
        words = codes.to(tl.pointer_type(tl.uint16)) + octets * 3
        middle = tl.load(words + 1, mask, 0).to(tl.uint32)
        low = tl.load(words, mask, 0).to(tl.uint32) | (middle << 16)
        high = (middle >> 8) | (tl.load(words + 2, mask, 0).to(tl.uint32) << 8)
    else:
        both = tl.load(codes.to(tl.pointer_type(tl.uint64)) + octets, mask, 0)
        low = both.to(tl.uint32)
        high = (both >> 32).to(tl.uint32)
    return scale, unpack(low, high, BITS)


@triton.jit
def load_base(base, place, num_groups, BASE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile of a stored message as fp32, and its part of the digest, uint32 [g, o]."""
    first, mask = firsts(place, GROUP), present(place, GROUP, ROWS)
    if BASE == "bf16" or BASE == "fp16":
        stored = load_values(base.to(tl.pointer_type(tl.uint16)), place, GROUP, ROWS)
        digest = digest_of(stored.to(tl.uint32), first, mask)
        if BASE == "bf16":
            values = to_fp32(stored.to(tl.uint32))
        else:
            values = stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        BITS: tl.constexpr = _base_bits(BASE)
        scale, codes = load_body(base, place, num_groups, BITS, GROUP)
        digest = digest_of(codes, first, mask) + _digest_of_scales(scale, place, num_groups, GROUP)
        values = tl.where(mask, code_values(codes, scale, BITS), 0.0)
    return values, digest


@triton.jit
def store_base(base, values, place, num_groups, BASE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Write a tile of values as a stored message; return its part of the digest, uint32 [g, o]."""
    first, mask = firsts(place, GROUP), present(place, GROUP, ROWS)
    GREATEST: tl.constexpr = _greatest(BASE)
    values = tl.minimum(tl.maximum(values, -GREATEST), GREATEST)
    if BASE == "bf16" or BASE == "fp16":
        values = tl.where(tl.abs(values) < LEAST, 0.0, values)
        if BASE == "bf16":
            stored = to_bf16_bits(values)
        else:
            stored = values.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        store_values(base.to(tl.pointer_type(tl.uint16)), stored.to(tl.uint16), place, GROUP, ROWS)
        digest = digest_of(stored, first, mask)
    else:
        BITS: tl.constexpr = _base_bits(BASE)
        values = tl.where(mask, values, 0.0)
        scale = scale_of(values, BITS, False)
        raised = round_levels(values, scale, None, None, None, BITS, False)
        low, high = pack(raised, scale, mask, BITS, ROWS)
        store_body(base, place, num_groups, scale, low, high, BITS, GROUP)
        digest = digest_of(unpack(low, high, BITS), first, mask)
        digest += _digest_of_scales(scale, place, num_groups, GROUP)
    return digest


@triton.jit
def _digest_of_scales(scale, place, num_groups, GROUP: tl.constexpr):
    """Return the scales' part of the digest, uint32 [g, o], in each group's first octet."""
    group, _, _, _ = place
    parts = (scale + 1) * odd32((group.to(tl.uint32) + 0x80000000) * WEIGHT)
    parts = tl.where(group < num_groups, parts, 0)[:, None]
    return tl.where(tl.arange(0, GROUP // 8)[None, :] == 0, parts, 0)
