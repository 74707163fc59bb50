"""AQ-SGD: what is sent is the quantized difference to what was last sent for the same sample.

Both ends keep the last message m of every sample (Wang et al., "Fine-tuning Language Models over Slow Networks using
Activation Compression with Guarantees", NeurIPS 2022, algorithm 1):

    first visit     send x itself (`first` says how)     both: m ← x as it arrived
    later visits    send Q(x − m)                        both: y = m + Q(x − m), m ← y; the receiver computes on y

As training settles, a sample's activation moves less from visit to visit, and so does the error.

Both ends must hold the same m. Each visit gives it a number and a digest, and before a batch is sent the two ends
compare them (`view`, `agree`): a sample on which they differ, for whatever reason (a crash between the two, an entry
that was evicted or damaged), is forgotten by both and sent as a first visit. From then until it is used an entry stays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import wantrain_kernels as kernels
from wantrain import wire
from wantrain.codec_spec import CodecSpec, parse_codec
from wantrain.codecs.codec import DTYPES, Codec, Loss
from wantrain.codecs.message_buffer import MessageBuffer
from wantrain.codecs.quantized import check_finite, dequantize, key_of, quantize, relative, some_rows
from wantrain.codecs.raw import read_raw, write_raw
from wantrain.errors import CodecError
from wantrain_kernels import reference

_KNOWN = struct.Struct("<IIB")
"""A sample in a view: number of visits, digest, whether it is held at all."""


def entry_bytes_of(spec: CodecSpec, sample_shape: tuple[int, ...]) -> int:
    """Return the bytes of what is kept of one sample."""
    return kernels.base_bytes(sample_shape, spec.base_format, spec.group_size)


class _Part(NamedTuple):
    """One sample's place in a body."""

    sample_id: int | None
    is_first: bool
    data: Tensor
    gap: Tensor


class AqsgdCodec(Codec):
    """One end of a boundary that remembers; `buffer` is this end's own."""

    def __init__(self, spec: CodecSpec, buffer: MessageBuffer, stream: int = 0, seed: int = 0) -> None:
        super().__init__(spec, stream, seed)
        self.buffer = buffer
        self._first = parse_codec(spec.first)
        self._agreed: dict[int, int] = {}
        """Number of visits of each coming sample that both ends hold alike."""
        self._taken: dict[int, Tensor] = {}
        """Bases that were looked at before their visit."""

    def view(self, sample_ids: Sequence[int]) -> bytes:
        """Return, beside the bits, the number of visits and the digest of what this end holds for each sample."""
        self.buffer.announce(sample_ids)
        entries = [
            _KNOWN.pack(known.sequence, known.digest, 1) if known is not None else _KNOWN.pack(0, 0, 0)
            for known in self.buffer.known(sample_ids)
        ]
        return super().view(sample_ids) + b"".join(entries)

    def agree(self, sample_ids: Sequence[int], own: bytes, other: bytes) -> None:
        """Keep what both ends hold alike, forget the rest."""
        super().agree(sample_ids, own, other)
        head = len(super().view(sample_ids))
        mine, theirs = _KNOWN.iter_unpack(own[head:]), _KNOWN.iter_unpack(other[head:])
        self._agreed = {}
        for sample_id, here, there in zip(sample_ids, mine, theirs, strict=True):
            if here == there and here[2]:
                self._agreed[sample_id] = here[0]
        self.buffer.forget([sample_id for sample_id in sample_ids if sample_id not in self._agreed])

    def _first_visits(self, shape: Sequence[int], sample_ids: Sequence[int]) -> int:
        num_samples = shape[0] if shape else 1
        if num_samples > wire.MAX_REMEMBERED:
            raise CodecError(f"'aqsgd' can't encode {num_samples} samples at once (at most {wire.MAX_REMEMBERED})")
        if sample_ids and len(sample_ids) != num_samples:
            raise CodecError(f"'aqsgd' was given {len(sample_ids)} sample ids for {num_samples} samples")
        seen: set[int] = set()
        first = 0
        for i, sample_id in enumerate(sample_ids or [-1] * num_samples):
            if sample_id not in self._agreed or sample_id in seen:  # the second of two in a batch: not agreed on
                first |= 1 << i
            seen.add(sample_id)
        return first

    def _parts(self, body: Tensor, shape: Sequence[int], sample_ids: Sequence[int], first: int) -> list[_Part]:
        """Cut a body into its samples' parts."""
        num_samples, each = (shape[0], tuple(shape[1:])) if shape else (1, ())
        size_first = wire.body_bytes(self._first, each)
        size_later = wire.quantized_bytes(each, self.bits, self.spec.group_size)
        is_first = [bool(first >> i & 1) for i in range(num_samples)]
        sizes = [size_first if one else size_later for one in is_first]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + wire.aligned(size))
        ids: Sequence[int | None] = list(sample_ids) or [None] * num_samples
        data = [body[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        gaps = [body[start + size : end] for start, size, end in zip(starts, sizes, starts[1:], strict=False)]
        return [_Part(*one) for one in zip(ids, is_first, data, gaps, strict=True)]

    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], first: int, body: Tensor) -> None:
        samples = tensor.unbind(0) if tensor.dim() else (tensor,)
        for sample, part in zip(samples, self._parts(body, tensor.shape, sample_ids, first), strict=True):
            part.gap.zero_()
            if part.is_first:
                self._write_first(sample, part)
            else:
                self._write_later(sample, part)

    def _check_body(self, body: Tensor, shape: tuple[int, ...], first: int) -> None:
        for part in self._parts(body, shape, (), first):
            spec, bits = (self._first, self._first.bits) if part.is_first else (self.spec, self.bits)
            if spec.kind != "raw":
                check_finite(spec, part.data, shape[1:], bits)

    def _read_body(self, header: wire.Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        parts = self._parts(body, header.shape, sample_ids, header.first)
        each, dtype = header.shape[1:], DTYPES[header.dtype]
        values = [
            self._read_first(part, each, dtype) if part.is_first else self._read_later(part, each, dtype)
            for part in parts
        ]
        if len(values) == 1:
            return values[0].reshape(header.shape)
        return torch.stack(values) if values else torch.empty(header.shape, dtype=dtype)

    def _write_first(self, sample: Tensor, part: _Part) -> None:
        if self._first.kind == "raw":
            write_raw(self._first, sample, part.data)
            sent = part._replace(data=part.data.to(sample.device))
        else:
            made = quantize(self._first, sample, self._first.bits, self._key(part.sample_id, 0))
            part.data.copy_(made, non_blocking=True)
            sent = part._replace(data=made)
        if part.sample_id is not None:
            self._remember(part.sample_id, self._decoded_first(sent, tuple(sample.shape), sample.dtype))

    def _read_first(self, part: _Part, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = self._decoded_first(part, shape, dtype)
        if part.sample_id is not None:
            self._remember(part.sample_id, values)
        return values

    def _decoded_first(self, part: _Part, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a first visit's values as the receiver gets them."""
        if self._first.kind == "raw":
            return read_raw(self._first, part.data, shape, dtype)
        key = self._key(part.sample_id, 0)
        return dequantize(self._first, part.data, shape, dtype, self._first.bits, key)

    def _remember(self, sample_id: int, values: Tensor) -> None:
        """Make `values` what this end holds for the sample; what is not finite is not kept."""
        if not bool(values.isfinite().all()):
            return
        base = self.buffer.new(sample_id)
        digest = kernels.base_store(values, base, self.spec.group_size, self.spec.base_format)
        self.buffer.done(sample_id, 1, digest)

    def _write_later(self, sample: Tensor, part: _Part) -> None:
        sample_id, num_visits, base = self._take(part)
        body, digest = kernels.delta_encode(
            sample, base, self.bits, self.spec.group_size, self.spec.base_format, self.spec.rounding,
            self._key(sample_id, num_visits), self.spec.saturate,
        )  # fmt: skip
        part.data.copy_(body, non_blocking=True)
        self.buffer.done(sample_id, num_visits + 1, digest)

    def _read_later(self, part: _Part, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        sample_id, num_visits, base = self._take(part)
        values, digest = kernels.delta_decode(
            part.data.to(base.device), base, shape, dtype, self.bits, self.spec.group_size, self.spec.base_format
        )
        self.buffer.done(sample_id, num_visits + 1, digest)
        return values

    def measure(self, tensor: Tensor, sample_ids: Sequence[int]) -> Loss | None:
        """Return what the samples that are no first visits, or some of their rows, would lose."""
        errors, clipped, values = [], [], []
        for sample, sample_id in zip(tensor, sample_ids, strict=True):
            if sample_id in self._agreed and sample_id not in self._taken:  # of two in a batch the first
                held = some_rows(self._peek(sample_id, tuple(sample.shape)))
                delta = some_rows(sample).float() - held
                key = self._key(sample_id, self._agreed[sample_id])
                one = reference.measure(delta, self.bits, self.spec.group_size, self.spec.rounding, key)
                errors.append(one[0])
                clipped.append(one[1])
                values.append(some_rows(sample))
        if not values:
            return None
        return Loss(relative(math.hypot(*errors), torch.stack(values)), sum(clipped) / len(clipped))

    def _peek(self, sample_id: int, shape: tuple[int, ...]) -> Tensor:
        """Return what is held of a sample, without using it up."""
        base = self._taken[sample_id] = self.buffer.take(sample_id)
        return kernels.base_load(base, shape, torch.float32, self.spec.group_size, self.spec.base_format)[0]

    def _take(self, part: _Part) -> tuple[int, int, Tensor]:
        """Return a sample on which both ends agree, its number of visits and its base, to be changed in place."""
        assert part.sample_id is not None, "data without identity is always a first visit"
        looked_at = self._taken.pop(part.sample_id, None)
        base = looked_at if looked_at is not None else self.buffer.take(part.sample_id)
        return part.sample_id, self._agreed.pop(part.sample_id), base

    def _key(self, sample_id: int | None, num_visits: int) -> int:
        """Return the key of what is random in a visit: it depends on nothing that another plan would change."""
        return key_of(self.seed, self.stream, -1 if sample_id is None else sample_id, num_visits)
