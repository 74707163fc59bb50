"""Direct quantization: every value as `bits` bits, one bf16 scale per group; with `hadamard`, rotated group by group.

Rotating first spreads a group's outlier over all of its values. For data that is seen once, where there is nothing to
take a difference to, that is what low bits need (TAH-Quant does so for activations of pre-training).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

import wantrain_kernels as kernels
from wantrain import wire
from wantrain.codec_spec import CodecSpec
from wantrain.codecs.codec import DTYPES, Codec, Loss
from wantrain.errors import CodecError
from wantrain_kernels import reference

_MEASURED_VALUES = 1 << 16
"""Chosen: gives a relative error within a hundredth of itself, in under a millisecond."""


class QuantizedCodec(Codec):
    """`quantized` and `hadamard`."""

    def _key(self, sequence: int, sample_ids: Sequence[int]) -> int:
        return key_of(self.seed, self.stream, sequence if self.moment is None else self.moment, *sample_ids)

    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], first: int, body: Tensor) -> None:
        made = quantize(self.spec, tensor, self.bits, self._key(self._num_encoded, sample_ids))
        body.copy_(made, non_blocking=True)

    def _check_body(self, body: Tensor, shape: tuple[int, ...], first: int) -> None:
        check_finite(self.spec, body, shape, self.bits)

    def _read_body(self, header: wire.Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        key = self._key(header.sequence, sample_ids)
        return dequantize(self.spec, body, header.shape, DTYPES[header.dtype], self.bits, key)

    def measure(self, tensor: Tensor, sample_ids: Sequence[int]) -> Loss | None:
        """Return what encoding this tensor, or a sample of its rows, now would lose."""
        tensor, key = some_rows(tensor), self._key(self._num_encoded, sample_ids)
        shape, dtype, bits, group_size = tuple(tensor.shape), torch.float32, self.bits, self.spec.group_size
        if self.spec.kind == "quantized":
            error, clipped = reference.measure(tensor, bits, group_size, self.spec.rounding, key)
        else:
            decoded = dequantize(
                self.spec, quantize(self.spec, tensor, bits, key).to(tensor.device), shape, dtype, bits, key
            )
            error, clipped = float(torch.linalg.vector_norm(decoded - tensor)), 0.0
        return Loss(relative(error, tensor), clipped)


def some_rows(tensor: Tensor) -> Tensor:
    """Return enough rows of a tensor to measure an error on: all of a small one."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return rows[:: max(1, tensor.numel() // _MEASURED_VALUES)]


def relative(error: float, tensor: Tensor) -> float:
    """Return an error by the tensor's norm; without an error it is none, whatever the norm."""
    return error / max(float(torch.linalg.vector_norm(tensor.detach().float())), 1e-30) if error else 0.0


def key_of(*numbers: int) -> int:
    """Return a key of 63 bits for some numbers."""
    packed = struct.pack(f"<{len(numbers)}Q", *(number & (1 << 64) - 1 for number in numbers))
    return xxhash.xxh3_64_intdigest(packed) >> 1


def quantize(spec: CodecSpec, tensor: Tensor, bits: int, key: int) -> Tensor:
    """Return the body of a tensor, on its device."""
    if spec.kind == "hadamard":
        return kernels.hadamard_quantize(tensor, bits, spec.group_size, key, spec.rounding, spec.saturate)
    return kernels.quantize(tensor, bits, spec.group_size, spec.rounding, key, spec.saturate)


def dequantize(
    spec: CodecSpec, body: Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int, key: int
) -> Tensor:
    """Return the tensor of a body."""
    if spec.kind == "hadamard":
        return kernels.hadamard_dequantize(body, shape, dtype, bits, spec.group_size, key)
    return kernels.dequantize(body, shape, dtype, bits, spec.group_size)


def check_finite(spec: CodecSpec, body: Tensor, shape: tuple[int, ...], bits: int) -> None:
    """Raise CodecError where a body's tensor had NaN or infinity."""
    found = kernels.num_nonfinite_groups(body, shape, bits, spec.group_size)
    if found:
        total = kernels.layout_of(shape, bits, spec.group_size).num_groups
        raise CodecError(
            f"'{spec.kind}:{bits}' met NaN or infinity in {found} of {total} groups of {spec.group_size} values;"
            " lower the learning rate, or use nonfinite=saturate"
        )
