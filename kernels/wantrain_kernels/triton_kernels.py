"""The four Triton kernels: values to codes and back, and a stored message written and read.

Each is one launch and one pass over memory. A program takes tiles program_id, program_id + num_programs, …; what is
constant for a compiled kernel (bits, group, base format, …) is a `constexpr`, so that nothing is decided per value.

**Digest without a second launch.** A sum over all programs needs a zero to start from and somebody to read it at the
end. Both are in one 64-bit word that is kept between launches: a program adds (its part << 32) + 1 in one atomic
operation, so the low half counts programs and the high half is their sum mod 2^32. Who counts the last program writes
the digest and puts the word back to zero. Launches of one stream follow each other, so each stream has a word.
"""

import math

import torch
import triton
import triton.language as tl

from wantrain_kernels.layout import GROUP_SIZES
from wantrain_kernels.triton_blocks import (
    NAN_SCALE,
    code_values,
    level_values,
    pack,
    places,
    random32,
    round_levels,
    saturated,
    scale_of,
    sum32,
)
from wantrain_kernels.triton_memory import (
    count_groups,
    count_tiles,
    firsts,
    load_base,
    load_body,
    load_values,
    locate,
    present,
    store_base,
    store_body,
    store_values,
)

_NORMS = {size: torch.tensor(1.0 / math.sqrt(size), dtype=torch.float32).item() for size in GROUP_SIZES}
_RUN_TIME = ["rows", "row_length", "key_low", "key_high"]


@triton.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@triton.constexpr_function
def _norm(group_size):
    return _NORMS[group_size]


@triton.jit
def _finish_digest(parts, word, digest):
    part = sum32(sum32(parts, 1), 0).to(tl.int64)
    before = tl.atomic_add(word, (part << 32) + 1, sem="relaxed")
    is_last = (before & 0xFFFFFFFF) == tl.num_programs(0) - 1
    tl.store(digest, ((before >> 32) + part) & 0xFFFFFFFF, is_last)
    tl.store(word, part * 0, is_last)


@triton.jit
def _signs(key_low, key_high, GROUP: tl.constexpr):
    """Return ±1 for each place of a group, [1, octets, 8]."""
    place = tl.arange(0, GROUP // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_negative = (random32(place.to(tl.uint32), key_low, key_high) >> 31) != 0
    return tl.where(is_negative, -1.0, 1.0)[None, :, :]


@triton.jit
def _walsh_hadamard(values, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Rotate each group: butterflies over distances 1, 2, 4 …, then one multiplication.

    A pair's sum and difference are sums over an axis of two, in registers or one shuffle away: nothing moves.
    """
    for stage in tl.static_range(_log2(GROUP)):
        pairs = tl.reshape(values, [TILE * GROUP >> (stage + 1), 2, 1 << stage])
        is_second = (tl.arange(0, 2) == 1)[None, :, None]
        sums = tl.sum(pairs, axis=1)[:, None, :]
        differences = tl.sum(tl.where(is_second, -pairs, pairs), axis=1)[:, None, :]
        values = tl.where(is_second, differences, sums)
    NORM: tl.constexpr = _norm(GROUP)
    return tl.reshape(values, [TILE, GROUP // 8, 8]) * NORM


@triton.jit
def _is_whole(group, row_length, GROUP: tl.constexpr):
    groups_per_row = (row_length + GROUP - 1) // GROUP
    return ((group % groups_per_row + 1) * GROUP <= row_length)[:, None, None]


@triton.jit
def _rotated(values, group, row_length, key_low, key_high, SATURATE: tl.constexpr, GROUP: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    rotated = _walsh_hadamard(values * _signs(key_low, key_high, GROUP), GROUP, TILE)
    rotated = tl.where(_is_whole(group, row_length, GROUP), rotated, values)
    if SATURATE:
        rotated = saturated(rotated)
    return rotated


@triton.jit(do_not_specialize=_RUN_TIME)
def encode_kernel(
    x, base, body, digest, word, rows, row_length, key_low, key_high, BITS: tl.constexpr, GROUP: tl.constexpr,
    BASE: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, SATURATE: tl.constexpr, ROTATE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the body of x (BASE "none"; rotated first if ROTATE), or of x − m and then m′ in place of m."""
    num_groups = count_groups(rows, row_length, GROUP)
    parts = tl.zeros([TILE, GROUP // 8], tl.uint32)
    tile = tl.program_id(0)
    while tile < count_tiles(num_groups, TILE):
        place = locate(tile, rows, row_length, GROUP, TILE, ROWS)
        values = load_values(x, place, GROUP, ROWS).to(tl.float32)
        if BASE != "none":
            m, _ = load_base(base, place, num_groups, BASE, GROUP, ROWS)
            values -= m
        if SATURATE:
            values = saturated(values)
        if ROTATE:
            values = _rotated(values, place[0], row_length, key_low, key_high, SATURATE, GROUP, TILE)
        scale = scale_of(values, BITS, STOCHASTIC)
        raised = round_levels(values, scale, places(firsts(place, GROUP)), key_low, key_high, BITS, STOCHASTIC)
        low, high = pack(raised, scale, present(place, GROUP, ROWS), BITS, ROWS)
        store_body(body, place, num_groups, scale, low, high, BITS, GROUP)
        if BASE != "none":
            y = m + level_values(raised, scale, BITS)
            y = tl.where((scale == NAN_SCALE)[:, None, None], m, y)
            parts += store_base(base, y, place, num_groups, BASE, GROUP, ROWS)
        tile += tl.num_programs(0)
    if BASE != "none":
        _finish_digest(parts, word, digest)


@triton.jit(do_not_specialize=_RUN_TIME)
def decode_kernel(
    body, base, out, digest, word, rows, row_length, key_low, key_high, BITS: tl.constexpr, GROUP: tl.constexpr,
    BASE: tl.constexpr, ROWS: tl.constexpr, ROTATE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the values of a body (BASE "none"; rotated back if ROTATE), or y = m + values and then m′ in place of m."""
    num_groups = count_groups(rows, row_length, GROUP)
    parts = tl.zeros([TILE, GROUP // 8], tl.uint32)
    tile = tl.program_id(0)
    while tile < count_tiles(num_groups, TILE):
        place = locate(tile, rows, row_length, GROUP, TILE, ROWS)
        scale, codes = load_body(body, place, num_groups, BITS, GROUP)
        values = code_values(codes, scale, BITS)
        if ROTATE:
            turned = _walsh_hadamard(values, GROUP, TILE) * _signs(key_low, key_high, GROUP)
            values = tl.where(_is_whole(place[0], row_length, GROUP), turned, values)
        if BASE != "none":
            m, _ = load_base(base, place, num_groups, BASE, GROUP, ROWS)
            values += m
            y = tl.where((scale == NAN_SCALE)[:, None, None], m, values)
            parts += store_base(base, y, place, num_groups, BASE, GROUP, ROWS)
        store_values(out, values, place, GROUP, ROWS)
        tile += tl.num_programs(0)
    if BASE != "none":
        _finish_digest(parts, word, digest)


@triton.jit(do_not_specialize=_RUN_TIME)
def store_kernel(
    x, base, digest, word, rows, row_length, GROUP: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write x as a stored message."""
    num_groups = count_groups(rows, row_length, GROUP)
    parts = tl.zeros([TILE, GROUP // 8], tl.uint32)
    tile = tl.program_id(0)
    while tile < count_tiles(num_groups, TILE):
        place = locate(tile, rows, row_length, GROUP, TILE, ROWS)
        values = load_values(x, place, GROUP, ROWS).to(tl.float32)
        parts += store_base(base, values, place, num_groups, BASE, GROUP, ROWS)
        tile += tl.num_programs(0)
    _finish_digest(parts, word, digest)


@triton.jit(do_not_specialize=_RUN_TIME)
def load_kernel(
    base, out, digest, word, rows, row_length, GROUP: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the values of a stored message."""
    num_groups = count_groups(rows, row_length, GROUP)
    parts = tl.zeros([TILE, GROUP // 8], tl.uint32)
    tile = tl.program_id(0)
    while tile < count_tiles(num_groups, TILE):
        place = locate(tile, rows, row_length, GROUP, TILE, ROWS)
        values, part = load_base(base, place, num_groups, BASE, GROUP, ROWS)
        store_values(out, values, place, GROUP, ROWS)
        parts += part
        tile += tl.num_programs(0)
    _finish_digest(parts, word, digest)
