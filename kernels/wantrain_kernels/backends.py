"""Which implementation computes an operation: chosen by where the tensors are, or by name.

    reference   plain PyTorch, any device: the definition
    cpu         numba, one pass over memory
    triton      GPU, and its interpreter on the CPU
    cuda        CUDA C++, built with WANTRAIN_CUDA=1

All give the same bytes, so the choice changes nothing but the time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Protocol, cast

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda")

_MODULES = {"reference": "reference", "cpu": "cpu_ops", "triton": "triton_ops", "cuda": "cuda_ops"}
_NEEDS = {"cpu": "numba", "triton": "triton", "cuda": "wantrain_kernels._cuda"}


class Backend(Protocol):
    """What a backend's module offers; see `reference` for what each computes."""

    def quantize(self, x: Tensor, bits: int, group_size: int, rounding: str, key: int, saturate: bool) -> Tensor: ...

    def dequantize(
        self, body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int
    ) -> Tensor: ...

    def delta_encode(
        self, x: Tensor, base: Tensor, bits: int, group_size: int, base_format: str, rounding: str, key: int,
        saturate: bool,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def delta_decode(
        self, body: Tensor, base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int,
        base_format: str,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def base_store(self, x: Tensor, base: Tensor, group_size: int, base_format: str) -> Tensor: ...

    def base_load(
        self, base: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group_size: int, base_format: str
    ) -> tuple[Tensor, Tensor]: ...

    def hadamard_quantize(
        self, x: Tensor, bits: int, group_size: int, key: int, rounding: str, saturate: bool
    ) -> Tensor: ...

    def hadamard_dequantize(
        self, body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, key: int
    ) -> Tensor: ...


@functools.cache
def is_available(name: str) -> bool:
    """Say whether a backend's library is installed (or, for cuda, built)."""
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None


def choose(name: str, device: torch.device) -> Backend:
    """Return a backend by name; "auto" is the fastest that is there for the device.

    Raise ValueError for an unknown name, RuntimeError for a backend that is not there or can't use the device.
    """
    if name == "auto":
        name = _fastest(device.type)
    if name not in NAMES:
        raise ValueError(f"no backend '{name}' (expected auto, {', '.join(NAMES)})")
    if not is_available(name):
        raise RuntimeError(f"backend '{name}' needs {_NEEDS[name]}, which is not installed")
    if not _can_use(name, device.type):
        raise RuntimeError(f"backend '{name}' can't work on device '{device}'")
    return cast(Backend, importlib.import_module(f"wantrain_kernels.{_MODULES[name]}"))


def _fastest(device_type: str) -> str:
    preferred = ("cpu",) if device_type == "cpu" else ("cuda", "triton")
    return next((name for name in preferred if is_available(name) and _can_use(name, device_type)), "reference")


def _can_use(name: str, device_type: str) -> bool:
    if name == "triton" and device_type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return name == "reference" or device_type == ("cpu" if name == "cpu" else "cuda")
