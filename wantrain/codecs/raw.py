"""Values as they are, in fp32, bf16 or fp16.

`raw:fp32` gives fp32, bf16 and fp16 tensors back bit for bit; the others round to nearest even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain import wire
from wantrain.codec_spec import CodecSpec
from wantrain.codecs.codec import DTYPES, Codec
from wantrain.errors import CodecError
from wantrain_kernels import reference


class RawCodec(Codec):
    """Casts to the dtype in its name, and back to the tensor's own."""

    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], first: int, body: Tensor) -> None:
        write_raw(self.spec, tensor, body)

    def _read_body(self, header: wire.Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        return read_raw(self.spec, body, header.shape, DTYPES[header.dtype])


def write_raw(spec: CodecSpec, tensor: Tensor, body: Tensor) -> None:
    """Fill `body` with the values in the spec's dtype; raise CodecError where fp16 can't hold one."""
    dtype = DTYPES[spec.dtype]
    reference.cast_to_bytes(tensor, dtype, out=body)
    if dtype is torch.float16 and tensor.dtype is not torch.float16:
        _check_range(spec.family, tensor, body.view(torch.float16))


def read_raw(spec: CodecSpec, body: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the values of `body`, in its memory where that is possible."""
    aligned = body if body.data_ptr() % 64 == 0 else body.clone()
    return reference.cast_from_bytes(aligned, DTYPES[spec.dtype], shape).to(dtype)


def _check_range(name: str, tensor: Tensor, cast: Tensor) -> None:
    """Raise CodecError where a finite value became infinite: fp16 ends at 65504."""
    if torch.isinf(cast).sum() > torch.isinf(tensor).sum():
        raise CodecError(
            f"'{name}' can't hold a value (got {tensor.abs().max():.3g}, expected at most 65504); use bf16"
        )
