"""The operations as functions for any device: `torch.library` custom operators, so that torch.compile keeps them whole.

Bodies, bases and digests are described in `layout` and `reference`. Tensors may be non-contiguous; bodies and bases are
contiguous one-dimensional uint8. Every function takes `backend`: "auto", or one of `backends.NAMES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain_kernels.backends import choose
from wantrain_kernels.layout import base_bytes, layout_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDINGS = ("nearest", "stochastic")


def quantize(
    x: Tensor, bits: int, group_size: int = 128, rounding: str = "nearest", key: int = 0, saturate: bool = False,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the body of a tensor: uint8 [layout_of(x.shape, bits, group_size).body_bytes].

    `key` (0 to 2^63−1) seeds stochastic rounding; derive keys by a hash, as keys that differ in few bits give the same
    random numbers to other places. NaN and infinity mark their group, see `num_nonfinite_groups`, or
    with `saturate` count as 0 and as the group's greatest value.
    """
    _check(x, bits, group_size, rounding, key)
    body: Tensor = _quantize(x, bits, group_size, rounding, key, saturate, backend)
    return body


def dequantize(
    body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128, *, backend: str = "auto"
) -> Tensor:
    """Return the tensor of a body."""
    _check_dtype(dtype, "return")
    _check_bytes(body, layout_of(shape, bits, group_size).body_bytes, "body")
    values: Tensor = _dequantize(body, list(shape), dtype, bits, group_size, backend)
    return values


def delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int = 128, base_format: str = "bf16", rounding: str = "nearest",
    key: int = 0, saturate: bool = False, *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the body of x − m and the new base's digest (int64 [1]); `base` is updated in place."""
    _check(x, bits, group_size, rounding, key)
    _check_base(base, x.shape, group_size, base_format)
    args = (x, base, bits, group_size, base_format, rounding, key, saturate, backend)
    encoded: tuple[Tensor, Tensor] = _delta_encode(*args)
    return encoded


def delta_decode(
    body: Tensor, base: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128,
    base_format: str = "bf16", *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return m + Q(x − m) and the new base's digest (int64 [1]); `base` is updated in place."""
    _check_dtype(dtype, "return")
    _check_bytes(body, layout_of(shape, bits, group_size).body_bytes, "body")
    _check_base(base, shape, group_size, base_format)
    args = (body, base, list(shape), dtype, bits, group_size, base_format, backend)
    decoded: tuple[Tensor, Tensor] = _delta_decode(*args)
    return decoded


def base_store(
    x: Tensor, base: Tensor, group_size: int = 128, base_format: str = "bf16", *, backend: str = "auto"
) -> Tensor:
    """Store finite values as a message in `base`, in place; return its digest (int64 [1])."""
    _check_dtype(x.dtype, "store")
    _check_base(base, x.shape, group_size, base_format)
    digest: Tensor = _base_store(x, base, group_size, base_format, backend)
    return digest


def base_load(
    base: Tensor, shape: Sequence[int], dtype: torch.dtype, group_size: int = 128, base_format: str = "bf16",
    *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the values of a stored message, and its digest (int64 [1])."""
    _check_dtype(dtype, "return")
    _check_base(base, shape, group_size, base_format)
    loaded: tuple[Tensor, Tensor] = _base_load(base, list(shape), dtype, group_size, base_format, backend)
    return loaded


def hadamard_quantize(
    x: Tensor, bits: int, group_size: int = 128, key: int = 0, rounding: str = "nearest", saturate: bool = False,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the body of the values, rotated group by group; `key` chooses the rotation."""
    _check(x, bits, group_size, rounding, key)
    body: Tensor = _hadamard_quantize(x, bits, group_size, key, rounding, saturate, backend)
    return body


def hadamard_dequantize(
    body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128, key: int = 0,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the tensor of a body of rotated groups."""
    _check_dtype(dtype, "return")
    _check_key("nearest", key)
    _check_bytes(body, layout_of(shape, bits, group_size).body_bytes, "body")
    values: Tensor = _hadamard_dequantize(body, list(shape), dtype, bits, group_size, key, backend)
    return values


def _check(x: Tensor, bits: int, group_size: int, rounding: str, key: int) -> None:
    layout_of(x.shape, bits, group_size)
    _check_dtype(x.dtype, "quantize")
    _check_key(rounding, key)


def _check_dtype(dtype: torch.dtype, verb: str) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"can't {verb} {dtype} (expected fp32, bf16 or fp16)")


def _check_key(rounding: str, key: int) -> None:
    if rounding not in _ROUNDINGS or not 0 <= key < 2**63:
        raise ValueError(f"no rounding '{rounding}' with key {key} (expected {_ROUNDINGS}, 0 to 2^63−1)")


def _check_base(base: Tensor, shape: Sequence[int], group_size: int, base_format: str) -> None:
    layout_of(shape, 8, group_size)
    _check_bytes(base, base_bytes(shape, base_format, group_size), "base")


def _check_bytes(data: Tensor, num_bytes: int, what: str) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != num_bytes or not data.is_contiguous():
        raise ValueError(f"the {what} is {data.dtype} {tuple(data.shape)} (expected contiguous uint8 [{num_bytes}])")


def _digest_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("wantrain::quantize", mutates_args=())
def _quantize(x: Tensor, bits: int, group_size: int, rounding: str, key: int, saturate: bool, backend: str) -> Tensor:
    return choose(backend, x.device).quantize(x.detach(), bits, group_size, rounding, key, saturate)


@_quantize.register_fake
def _(x: Tensor, bits: int, group_size: int, rounding: str, key: int, saturate: bool, backend: str) -> Tensor:
    return x.new_empty(layout_of(x.shape, bits, group_size).body_bytes, dtype=torch.uint8)


@torch.library.custom_op("wantrain::dequantize", mutates_args=())
def _dequantize(body: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, backend: str) -> Tensor:
    return choose(backend, body.device).dequantize(body, tuple(shape), dtype, bits, group_size)


@_dequantize.register_fake
def _(body: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, backend: str) -> Tensor:
    return body.new_empty(shape, dtype=dtype)


@torch.library.custom_op("wantrain::delta_encode", mutates_args=("base",))
def _delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int, base_format: str, rounding: str, key: int, saturate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = choose(backend, x.device)
    return chosen.delta_encode(x.detach(), base, bits, group_size, base_format, rounding, key, saturate)


@_delta_encode.register_fake
def _(
    x: Tensor, base: Tensor, bits: int, group_size: int, base_format: str, rounding: str, key: int, saturate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(layout_of(x.shape, bits, group_size).body_bytes, dtype=torch.uint8), _digest_like(x)


@torch.library.custom_op("wantrain::delta_decode", mutates_args=("base",))
def _delta_decode(
    body: Tensor, base: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, base_format: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return choose(backend, body.device).delta_decode(body, base, tuple(shape), dtype, bits, group_size, base_format)


@_delta_decode.register_fake
def _(
    body: Tensor, base: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, base_format: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return body.new_empty(shape, dtype=dtype), _digest_like(body)


@torch.library.custom_op("wantrain::base_store", mutates_args=("base",))
def _base_store(x: Tensor, base: Tensor, group_size: int, base_format: str, backend: str) -> Tensor:
    return choose(backend, x.device).base_store(x.detach(), base, group_size, base_format)


@_base_store.register_fake
def _(x: Tensor, base: Tensor, group_size: int, base_format: str, backend: str) -> Tensor:
    return _digest_like(x)


@torch.library.custom_op("wantrain::base_load", mutates_args=())
def _base_load(
    base: Tensor, shape: list[int], dtype: torch.dtype, group_size: int, base_format: str, backend: str
) -> tuple[Tensor, Tensor]:
    return choose(backend, base.device).base_load(base, tuple(shape), dtype, group_size, base_format)


@_base_load.register_fake
def _(
    base: Tensor, shape: list[int], dtype: torch.dtype, group_size: int, base_format: str, backend: str
) -> tuple[Tensor, Tensor]:
    return base.new_empty(shape, dtype=dtype), _digest_like(base)


@torch.library.custom_op("wantrain::hadamard_quantize", mutates_args=())
def _hadamard_quantize(
    x: Tensor, bits: int, group_size: int, key: int, rounding: str, saturate: bool, backend: str
) -> Tensor:
    return choose(backend, x.device).hadamard_quantize(x.detach(), bits, group_size, key, rounding, saturate)


@_hadamard_quantize.register_fake
def _(x: Tensor, bits: int, group_size: int, key: int, rounding: str, saturate: bool, backend: str) -> Tensor:
    return x.new_empty(layout_of(x.shape, bits, group_size).body_bytes, dtype=torch.uint8)


@torch.library.custom_op("wantrain::hadamard_dequantize", mutates_args=())
def _hadamard_dequantize(
    body: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, key: int, backend: str
) -> Tensor:
    return choose(backend, body.device).hadamard_dequantize(body, tuple(shape), dtype, bits, group_size, key)


@_hadamard_dequantize.register_fake
def _(body: Tensor, shape: list[int], dtype: torch.dtype, bits: int, group_size: int, key: int, backend: str) -> Tensor:
    return body.new_empty(shape, dtype=dtype)
