"""The operations in CUDA C++: delta_encode, delta_decode, quantize and dequantize; the others are Triton's.

The kernels lie in `csrc/`. Their library is loaded by the first call, which raises ImportError where it was not built.
It speaks plain C: addresses, a stream's handle, numbers. It is built without torch's headers, so that one build serves
every version of torch (and of Python) and compiles where torch knows no GPU.

One launch each, whatever the shape. Rows of whole octets (`row_length` a multiple of 8) at addresses that are multiples
of 16 are read and written 16 bytes at a time; anything else piece by piece, with the same bytes as a result. A tensor
that is not contiguous is copied first.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from wantrain_kernels.backends import choose
from wantrain_kernels.layout import BASE_BITS, Layout, layout_of

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BASE_TYPES = {"bf16": 1, "fp16": 2}
_OPERATIONS = ("quantize", "dequantize", "delta_encode", "delta_decode")


class _Call(ctypes.Structure):
    """`wantrain::Call` of csrc/call.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "base", "body", "y", "digest", "scratch", "stream")),
        *((name, ctypes.c_int64) for name in ("rows", "row_length")),
        ("key", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("bits", "group_size", "value_type", "base_type")),
        *((name, ctypes.c_int) for name in ("is_stochastic", "is_saturating", "device")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    spec = find_spec("wantrain_kernels._cuda")
    if spec is None or spec.origin is None:
        raise ImportError("the CUDA kernels are not built; install with WANTRAIN_CUDA=1 and nvcc 12.4 or newer on PATH")
    library = ctypes.CDLL(spec.origin)
    for name in _OPERATIONS:
        function = getattr(library, f"wantrain_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], ctypes.c_char_p
    if library.wantrain_call_bytes() != ctypes.sizeof(_Call):
        raise ImportError(f"{spec.origin} is of another version; build it anew")
    return library


def quantize(x: Tensor, bits: int, group_size: int, rounding: str, key: int, saturate: bool) -> Tensor:
    """Return the body of `x`; see `reference.quantize`."""
    layout, x = layout_of(x.shape, bits, group_size), x.detach().contiguous()
    body = torch.empty(layout.body_bytes, dtype=torch.uint8, device=x.device)
    call = _call_of(layout, x.dtype, x.device, body)
    _set_input(call, x, rounding, key, saturate)
    _run("quantize", call)
    return body


def dequantize(body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int) -> Tensor:
    """Return the values of a body; see `reference.dequantize`."""
    y = torch.empty(shape, dtype=dtype, device=body.device)
    call = _call_of(layout_of(shape, bits, group_size), dtype, body.device, body)
    call.y = y.data_ptr()
    _run("dequantize", call)
    return y


def delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int, base_format: str, rounding: str, key: int, saturate: bool
) -> tuple[Tensor, Tensor]:
    """Return the body of x − m and the digest of m′; see `reference.delta_encode`."""
    if base_format in BASE_BITS:
        triton = choose("triton", x.device)
        return triton.delta_encode(x, base, bits, group_size, base_format, rounding, key, saturate)
    layout, x = layout_of(x.shape, bits, group_size), x.detach().contiguous()
    body = torch.empty(layout.body_bytes, dtype=torch.uint8, device=x.device)
    call = _call_of(layout, x.dtype, x.device, body)
    _set_input(call, x, rounding, key, saturate)
    digest = _set_base(call, layout, base, base_format)
    _run("delta_encode", call)
    return body, digest


def delta_decode(
    body: Tensor, base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int,
    base_format: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return m + Q(x − m) and the digest of m′; see `reference.delta_decode`."""
    if base_format in BASE_BITS:
        triton = choose("triton", body.device)
        return triton.delta_decode(body, base, shape, dtype, bits, group_size, base_format)
    layout = layout_of(shape, bits, group_size)
    y = torch.empty(shape, dtype=dtype, device=body.device)
    call = _call_of(layout, dtype, body.device, body)
    call.y = y.data_ptr()
    digest = _set_base(call, layout, base, base_format)
    _run("delta_decode", call)
    return y, digest


def base_store(x: Tensor, base: Tensor, group_size: int, base_format: str) -> Tensor:
    """Store a message; see `reference.base_store`."""
    return choose("triton", x.device).base_store(x, base, group_size, base_format)


def base_load(
    base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group_size: int, base_format: str
) -> tuple[Tensor, Tensor]:
    """Return a stored message and its digest; see `reference.base_load`."""
    return choose("triton", base.device).base_load(base, shape, dtype, group_size, base_format)


def hadamard_quantize(x: Tensor, bits: int, group_size: int, key: int, rounding: str, saturate: bool) -> Tensor:
    """Return the body of rotated values; see `reference.hadamard_quantize`."""
    return choose("triton", x.device).hadamard_quantize(x, bits, group_size, key, rounding, saturate)


def hadamard_dequantize(
    body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, key: int
) -> Tensor:
    """Return the values of a rotated body; see `reference.hadamard_dequantize`."""
    return choose("triton", body.device).hadamard_dequantize(body, shape, dtype, bits, group_size, key)


def _call_of(layout: Layout, dtype: torch.dtype, device: torch.device, body: Tensor) -> _Call:
    if dtype not in _TYPES:
        raise ValueError(f"the CUDA kernels have no {dtype} (expected fp32, bf16 or fp16)")
    return _Call(
        body=body.data_ptr(), stream=_stream_of(device), rows=layout.rows, row_length=layout.row_length,
        bits=layout.bits, group_size=layout.group_size, value_type=_TYPES[dtype], device=device.index or 0,
    )  # fmt: skip


def _set_input(call: _Call, x: Tensor, rounding: str, key: int, saturate: bool) -> None:
    call.x, call.key = x.data_ptr(), key
    call.is_stochastic, call.is_saturating = rounding == "stochastic", saturate


def _set_base(call: _Call, layout: Layout, base: Tensor, base_format: str) -> Tensor:
    """Add base and digest to a call; return the digest."""
    if base.data_ptr() % 2:
        raise ValueError("the base begins at an odd address (expected an even one); copy it")
    empty = layout.num_values == 0
    digest = (torch.zeros if empty else torch.empty)(1, dtype=torch.int64, device=base.device)
    call.base, call.base_type, call.digest = base.data_ptr(), _BASE_TYPES[base_format], digest.data_ptr()
    call.scratch = _scratch_of(base.device, call.stream or 0).data_ptr()
    return digest


def _run(name: str, call: _Call) -> None:
    if call.rows == 0 or call.row_length == 0:
        return
    error = getattr(_library(), f"wantrain_{name}")(ctypes.byref(call))
    if error is not None:
        raise RuntimeError(f"the CUDA kernel {name} did not start: {error.decode()}")


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _scratch_of(device: torch.device, stream: int) -> Tensor:
    """Return a zero that a kernel may count in, if it leaves it zero: one for each stream.

    A captured graph may run beside the stream that it was captured on, so it gets its own, set to zero in the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    return _kept_scratch(device, stream)


@functools.cache
def _kept_scratch(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)
