"""The CPU backend: the signatures of `reference` on compiled loops, one pass over memory, one thread per call.

One thread, because training uses the cores already; codec threads overlap, since the loops hold no lock.

Numba compiles them on the user's machine, for its processor, and needs no compiler there, which torch.compile and an
extension in C++ do. torch.compile of `reference.quantize` takes 43 s to compile and reaches 26 M values/s, twice what
it has without, where these loops reach 1200 to 2000 (one core, Sapphire Rapids, measured).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wantrain_kernels import cpu_kernels
from wantrain_kernels.cpu_bits import BF16, FP16, FP32, Q4, Q8
from wantrain_kernels.cpu_groups import Base, Body, Rows
from wantrain_kernels.cpu_loops import Levels
from wantrain_kernels.layout import BASE_BITS, Layout, layout_of
from wantrain_kernels.reference import bias, greatest_q, offset, scale_factor, split_key

_FORMS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
_BASES = {"bf16": BF16, "fp16": FP16, "q8": Q8, "q4": Q4}


def quantize(
    x: Tensor, bits: int, group_size: int = 128, rounding: str = "nearest", key: int = 0, saturate: bool = False
) -> Tensor:
    """Return the body of `x`."""
    x, layout = x.contiguous(), layout_of(x.shape, bits, group_size)
    out = torch.empty(layout.body_bytes, dtype=torch.uint8)
    body = _body(layout, rounding, key, saturate)
    cpu_kernels.quantize(x.data_ptr(), _FORMS[x.dtype], _rows(layout), body, out.data_ptr())
    return out


def dequantize(body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128) -> Tensor:
    """Return the values of a body."""
    layout, out = layout_of(shape, bits, group_size), torch.empty(tuple(shape), dtype=dtype)
    cpu_kernels.dequantize(body.data_ptr(), _rows(layout), _body(layout), _FORMS[dtype], out.data_ptr())
    return out


def delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int = 128, base_format: str = "bf16", rounding: str = "nearest",
    key: int = 0, saturate: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the body of x − m and the digest of m′, which takes the place of m in `base`."""
    x, layout = x.contiguous(), layout_of(x.shape, bits, group_size)
    out = torch.empty(layout.body_bytes, dtype=torch.uint8)
    form, body = _base(layout, base_format), _body(layout, rounding, key, saturate)
    digest = cpu_kernels.delta_encode(
        x.data_ptr(), _FORMS[x.dtype], _rows(layout), form, base.data_ptr(), body, out.data_ptr()
    )
    return out, torch.tensor([digest])


def delta_decode(
    body: Tensor, base: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128,
    base_format: str = "bf16",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the digest of m′, which takes the place of m in `base`."""
    layout, out = layout_of(shape, bits, group_size), torch.empty(tuple(shape), dtype=dtype)
    digest = cpu_kernels.delta_decode(
        body.data_ptr(), _rows(layout), _body(layout), _base(layout, base_format), base.data_ptr(),
        _FORMS[dtype], out.data_ptr(),
    )  # fmt: skip
    return out, torch.tensor([digest])


def base_store(x: Tensor, base: Tensor, group_size: int = 128, base_format: str = "bf16") -> Tensor:
    """Store finite values as a message in `base`; return its digest."""
    x, layout = x.contiguous(), layout_of(x.shape, 8, group_size)
    digest = cpu_kernels.base_store(
        x.data_ptr(), _FORMS[x.dtype], _rows(layout), _base(layout, base_format), base.data_ptr()
    )
    return torch.tensor([digest])


def base_load(
    base: Tensor, shape: Sequence[int], dtype: torch.dtype, group_size: int = 128, base_format: str = "bf16"
) -> tuple[Tensor, Tensor]:
    """Return the values of a stored message, and its digest."""
    layout, out = layout_of(shape, 8, group_size), torch.empty(tuple(shape), dtype=dtype)
    form = _base(layout, base_format)
    digest = cpu_kernels.base_load(base.data_ptr(), _rows(layout), form, _FORMS[dtype], out.data_ptr())
    return out, torch.tensor([digest])


def hadamard_quantize(
    x: Tensor, bits: int, group_size: int = 128, key: int = 0, rounding: str = "nearest", saturate: bool = False
) -> Tensor:
    """Return the body of the values, every whole group rotated first."""
    x, layout = x.contiguous(), layout_of(x.shape, bits, group_size)
    out = torch.empty(layout.body_bytes, dtype=torch.uint8)
    body = _body(layout, rounding, key, saturate)
    cpu_kernels.hadamard_quantize(x.data_ptr(), _FORMS[x.dtype], _rows(layout), body, out.data_ptr())
    return out


def hadamard_dequantize(
    body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128, key: int = 0
) -> Tensor:
    """Return the values of a body of rotated groups."""
    layout, out = layout_of(shape, bits, group_size), torch.empty(tuple(shape), dtype=dtype)
    rotated = _body(layout, "nearest", key)
    cpu_kernels.hadamard_dequantize(body.data_ptr(), _rows(layout), rotated, _FORMS[dtype], out.data_ptr())
    return out


def _rows(layout: Layout) -> Rows:
    return Rows(layout.rows if layout.row_length else 0, layout.row_length, layout.group_size)


@functools.lru_cache(maxsize=256)
def _body(layout: Layout, rounding: str = "nearest", key: int = 0, saturate: bool = False) -> Body:
    bits, (low, high) = layout.bits, split_key(key)
    levels = Levels(
        bits, np.float32(offset(bits)), bias(bits), greatest_q(bits), np.float32(scale_factor(bits, rounding)),
        rounding == "stochastic", np.uint32(low), np.uint32(high), saturate,
    )  # fmt: skip
    return Body(layout.scales_bytes, layout.row_code_bytes, levels)


def _base(layout: Layout, base_format: str) -> Base:
    bits = BASE_BITS.get(base_format, 8)
    return Base(_BASES[base_format], _body(Layout(layout.rows, layout.row_length, bits, layout.group_size)))
