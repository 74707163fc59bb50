"""The operations of the CPU backend on whole tensors: one loop over groups, each touched once.

Tensors come as addresses with their form beside them, so that a kernel has a single signature and is compiled once for
every number of bits, group size, dtype and kind of base, and so that numba counts no references inside the loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wantrain_kernels.cpu_bits import BF16, FP16, load_u16, pointer, scratch
from wantrain_kernels.cpu_groups import (
    advance,
    codes_of,
    digest_of_codes,
    digest_of_halves,
    finish_body,
    finish_message,
    first_group,
    load_message,
    next_group,
    put_codes,
    rotate,
    store_message,
    take_values,
    turn,
    write_signs,
)
from wantrain_kernels.cpu_jit import kernel
from wantrain_kernels.cpu_loops import (
    INFINITY_BITS,
    bound,
    fetch,
    fetch_delta,
    greatest_bits,
    quantize_group,
    spill,
    unpack,
)


@kernel
def quantize(x: Any, form: Any, rows: Any, body: Any, out: Any) -> None:
    """See `reference.quantize`."""
    x, out, values, codes = pointer(x), pointer(out), scratch(), scratch()
    group = first_group(rows)
    while group.row < rows.rows:
        greatest = fetch(x, form, group.place, group.size, values)
        scale = quantize_group(values, greatest, group.size, group.place, body.levels, codes)
        put_codes(group, codes, scale, body, out)
        group = next_group(group, rows)
    finish_body(group, body, out)


@kernel
def dequantize(data: Any, rows: Any, body: Any, form: Any, out: Any) -> None:
    """See `reference.dequantize`."""
    data, out, values, codes = pointer(data), pointer(out), scratch(), scratch()
    group = first_group(rows)
    while group.row < rows.rows:
        take_values(group, body, data, codes, values)
        spill(values, form, group.place, group.size, out)
        group = next_group(group, rows)


@kernel
def delta_encode(x: Any, form: Any, rows: Any, base: Any, message: Any, body: Any, out: Any) -> Any:
    """Write the body to `out` and m′ to `message`; return the digest. See `reference.delta_encode`."""
    x, message, out = pointer(x), pointer(message), pointer(out)
    values, m, kept, codes = scratch(), scratch(), scratch(), scratch()
    digest, levels = np.uint32(0), body.levels
    group = first_group(rows)
    while group.row < rows.rows:
        load_message(group, base, message, codes, m)
        greatest = fetch_delta(x, form, group.place, group.size, m, values)
        scale = quantize_group(values, greatest, group.size, group.place, levels, codes)
        advance(codes, scale, levels, m, values, kept, group.size)
        put_codes(group, codes, scale, body, out)
        digest = np.uint32(digest + store_message(group, base, kept, codes, message))
        group = next_group(group, rows)
    finish_body(group, body, out)
    finish_message(group, base, message)
    return digest


@kernel
def delta_decode(data: Any, rows: Any, body: Any, base: Any, message: Any, form: Any, out: Any) -> Any:
    """Write y to `out` and m′ to `message`; return the digest. See `reference.delta_decode`."""
    data, message, out = pointer(data), pointer(message), pointer(out)
    values, m, kept, codes = scratch(), scratch(), scratch(), scratch()
    digest = np.uint32(0)
    group = first_group(rows)
    while group.row < rows.rows:
        load_message(group, base, message, codes, m)
        unpack(codes_of(group, body, data), (group.size + 7) >> 3, body.levels.bits, codes)
        advance(codes, load_u16(data, group.number), body.levels, m, values, kept, group.size)
        spill(values, form, group.place, group.size, out)
        digest = np.uint32(digest + store_message(group, base, kept, codes, message))
        group = next_group(group, rows)
    finish_message(group, base, message)
    return digest


@kernel
def base_store(x: Any, form: Any, rows: Any, base: Any, message: Any) -> Any:
    """See `reference.base_store`."""
    x, message, values, codes = pointer(x), pointer(message), scratch(), scratch()
    digest = np.uint32(0)
    group = first_group(rows)
    while group.row < rows.rows:
        fetch(x, form, group.place, group.size, values)
        digest = np.uint32(digest + store_message(group, base, values, codes, message))
        group = next_group(group, rows)
    finish_message(group, base, message)
    return digest


@kernel
def base_load(message: Any, rows: Any, base: Any, form: Any, out: Any) -> Any:
    """See `reference.base_load`."""
    message, out, values, codes = pointer(message), pointer(out), scratch(), scratch()
    digest = np.uint32(0)
    group = first_group(rows)
    while group.row < rows.rows:
        load_message(group, base, message, codes, values)
        spill(values, form, group.place, group.size, out)
        if base.form == BF16 or base.form == FP16:
            digest = np.uint32(digest + digest_of_halves(group, message))
        else:
            digest = np.uint32(digest + digest_of_codes(group, codes, load_u16(message, group.number)))
        group = next_group(group, rows)
    return digest


@kernel
def hadamard_quantize(x: Any, form: Any, rows: Any, body: Any, out: Any) -> None:
    """See `reference.hadamard_quantize`."""
    x, out, values, codes, signs = pointer(x), pointer(out), scratch(), scratch(), scratch()
    levels = body.levels
    write_signs(levels.key_low, levels.key_high, rows.group_size, signs)
    group = first_group(rows)
    while group.row < rows.rows:
        greatest = fetch(x, form, group.place, group.size, values)
        if levels.saturate and greatest >= INFINITY_BITS:
            greatest = bound(values, group.size)
        if group.size == rows.group_size:
            turn(values, signs, group.size)
            rotate(values, group.size)
            greatest = greatest_bits(values, group.size)
        scale = quantize_group(values, greatest, group.size, group.place, levels, codes)
        put_codes(group, codes, scale, body, out)
        group = next_group(group, rows)
    finish_body(group, body, out)


@kernel
def hadamard_dequantize(data: Any, rows: Any, body: Any, form: Any, out: Any) -> None:
    """See `reference.hadamard_dequantize`."""
    data, out, values, codes, signs = pointer(data), pointer(out), scratch(), scratch(), scratch()
    write_signs(body.levels.key_low, body.levels.key_high, rows.group_size, signs)
    group = first_group(rows)
    while group.row < rows.rows:
        take_values(group, body, data, codes, values)
        if group.size == rows.group_size:
            rotate(values, group.size)
            turn(values, signs, group.size)
        spill(values, form, group.place, group.size, out)
        group = next_group(group, rows)
