"""The operations on the GPU, in Triton: one launch and one pass over memory each; see `triton_kernels`.

On the CPU they run in Triton's interpreter, for tests: TRITON_INTERPRET=1, set before this module is imported.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wantrain_kernels.layout import OCTET, Layout, layout_of
from wantrain_kernels.reference import split_key
from wantrain_kernels.triton_kernels import decode_kernel, encode_kernel, load_kernel, store_kernel

TILE_VALUES = 1024
"""Derived from what the compiler makes of it (`check_triton.py`): with four warps, one octet per thread. Delta encode
then takes 48 registers, so an H200's multiprocessor holds 40 warps with 40 KiB of x and m under way; with two octets it
takes 103, and 16 warps have 32 KiB. Reading and writing at 4.8 TB/s with 0.8 µs to memory asks for 29 KiB."""

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Without fusing a·b + c the GPU rounds as the reference does."""

_PROGRAMS_PER_MULTIPROCESSOR = 32
"""Chosen: two to three times what fits at once, so that all end together; many more would only meet at the digest."""

_INTERPRETED_PROGRAMS = 2
"""Chosen: the interpreter, too, has programs that take several tiles, and several programs that make a digest."""

_ALIGNMENT = 16


def quantize(x: Tensor, bits: int, group_size: int, rounding: str, key: int, saturate: bool) -> Tensor:
    """Return the body of `x`."""
    return _encode(x, None, bits, group_size, "none", rounding, key, saturate, rotate=False)[0]


def dequantize(body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int) -> Tensor:
    """Return the values of a body."""
    return _decode(body, None, shape, dtype, bits, group_size, "none", 0, rotate=False)[0]


def delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int, base_format: str, rounding: str, key: int, saturate: bool
) -> tuple[Tensor, Tensor]:
    """Return the body of x − m and the digest of m′, which takes the place of m in `base`."""
    return _encode(x, base, bits, group_size, base_format, rounding, key, saturate, rotate=False)


def delta_decode(
    body: Tensor, base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, base_format: str
) -> tuple[Tensor, Tensor]:
    """Return y and the digest of m′, which takes the place of m in `base`."""
    return _decode(body, base, shape, dtype, bits, group_size, base_format, 0, rotate=False)


def hadamard_quantize(x: Tensor, bits: int, group_size: int, key: int, rounding: str, saturate: bool) -> Tensor:
    """Return the body of the rotated values."""
    return _encode(x, None, bits, group_size, "none", rounding, key, saturate, rotate=True)[0]


def hadamard_dequantize(
    body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, key: int
) -> Tensor:
    """Return the values of a body of rotated groups."""
    return _decode(body, None, shape, dtype, bits, group_size, "none", key, rotate=True)[0]


def base_store(x: Tensor, base: Tensor, group_size: int, base_format: str) -> Tensor:
    """Store finite values as a message in `base`; return its digest."""
    layout = layout_of(x.shape, 8, group_size)
    digest, stored = _new_digest(x, layout), _aligned(base)
    _launch(store_kernel, layout, x.device, x.contiguous(), stored, digest, _word(x.device), BASE=base_format)
    _put_back(stored, base)
    return digest


def base_load(
    base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group_size: int, base_format: str
) -> tuple[Tensor, Tensor]:
    """Return the values of a stored message, and its digest."""
    layout = layout_of(shape, 8, group_size)
    out, digest = base.new_empty(shape, dtype=dtype), _new_digest(base, layout)
    _launch(load_kernel, layout, base.device, _aligned(base), out, digest, _word(base.device), BASE=base_format)
    return out, digest


def _encode(
    x: Tensor, base: Tensor | None, bits: int, group_size: int, base_format: str, rounding: str, key: int,
    saturate: bool, rotate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = layout_of(x.shape, bits, group_size)
    body, digest = x.new_empty(layout.body_bytes, dtype=torch.uint8), _new_digest(x, layout)
    stored, word = _aligned(base), None if base is None else _word(x.device)
    _launch(
        encode_kernel, layout, x.device, x.contiguous(), stored, body, digest, word, key=key, BITS=bits,
        BASE=base_format, STOCHASTIC=rounding == "stochastic", SATURATE=saturate, ROTATE=rotate,
    )  # fmt: skip
    _put_back(stored, base)
    return body, digest


def _decode(
    body: Tensor, base: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int,
    base_format: str, key: int, rotate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = layout_of(shape, bits, group_size)
    out, digest = body.new_empty(shape, dtype=dtype), _new_digest(body, layout)
    stored, word = _aligned(base), None if base is None else _word(body.device)
    _launch(
        decode_kernel, layout, body.device, _aligned(body), stored, out, digest, word, key=key, BITS=bits,
        BASE=base_format, ROTATE=rotate,
    )  # fmt: skip
    _put_back(stored, base)
    return out, digest


def _launch(
    kernel: Any, layout: Layout, device: torch.device, *tensors: Tensor | None, key: int | None = None, **constants: Any
) -> None:
    if not layout.num_values:
        return
    keys = () if key is None else tuple(_as_int32(half) for half in split_key(key))
    constants |= shape_constants(layout)
    grid = (min(-(-layout.num_groups // constants["TILE"]), _most_programs(device)),)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*tensors, layout.rows, layout.row_length, *keys, **constants, **OPTIONS)


def shape_constants(layout: Layout) -> dict[str, Any]:
    """Return what is compiled in of a tensor's shape: as little as is of use."""
    if layout.row_length % layout.group_size == 0:
        rows = "groups"
    else:
        rows = "values" if layout.row_length % OCTET else "octets"
    return {"GROUP": layout.group_size, "ROWS": rows, "TILE": TILE_VALUES // layout.group_size}


def _as_int32(number: int) -> int:
    return number - (number >> 31 << 32)


@functools.cache
def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_MULTIPROCESSOR


def _new_digest(like: Tensor, layout: Layout) -> Tensor:
    """Return a place for the digest; that of nothing is zero, and no kernel runs for it."""
    return like.new_empty(1, dtype=torch.int64) if layout.num_values else like.new_zeros(1, dtype=torch.int64)


def _word(device: torch.device) -> Tensor:
    """Return the current stream's word for digests; a graph under capture gets one of its own, zeroed by the graph."""
    if device.type != "cuda":
        return _word_of_stream(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    return _word_of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _word_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def _aligned(data: Tensor | None) -> Tensor | None:
    """Return the bytes where a thread may read eight at once: themselves, unless they begin amid something."""
    return data if data is None or data.data_ptr() % _ALIGNMENT == 0 else data.clone()


def _put_back(stored: Tensor | None, base: Tensor | None) -> None:
    if stored is not None and base is not None and stored is not base:
        base.copy_(stored)
