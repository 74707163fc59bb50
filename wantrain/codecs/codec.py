"""The contract between tensors and bytes: `encode` makes one message, `decode` on the other end gives the tensor back.

A codec instance is one end of one direction: it numbers what it encodes and expects the same numbers when it decodes,
so a payload lost, doubled or taken for another is found before its numbers are used. What arrives damaged is a
ChannelError; nothing is guessed.

What both ends must know before a payload is made, they agree on one step ahead: `view` says what this end holds for
the samples that come next, and `agree` takes both ends' views (see `wantrain.pipeline.agreement`).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from wantrain import wire
from wantrain.codec_spec import CodecSpec, bits_of, own_codec, parse_codec
from wantrain.errors import ChannelError, CodecError
from wantrain_kernels import warm_up

Payload: TypeAlias = Tensor
"""One message: a contiguous one-dimensional uint8 CPU tensor, wire.HEADER_BYTES of header and then the body."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_VIEW_HEAD = struct.Struct("<B")


class Loss(NamedTuple):
    """What a payload lacks: the norm of the error by the tensor's own, and the share of values that were clipped."""

    relative_error: float
    clipped_share: float


class Codec(ABC):
    """One end of one direction between two workers. Not for use by two threads at once.

    A codec writes and reads the body of a payload (`_write_body`, `_read_body`); header, order and checks are done
    here. What it keeps between payloads is its own affair; what both ends must know alike goes through `view`.
    """

    def __init__(self, spec: CodecSpec, stream: int = 0, seed: int = 0) -> None:
        self.spec = spec
        self.stream = stream
        self.seed = seed
        """Keys what is random, the same at both ends."""
        self.bits = spec.bits
        """Of the payloads to come; more than the spec's once the ends have agreed on more."""
        self.wanted_bits = spec.bits
        """What this end will ask for at the next agreement."""
        self.moment: int | None = None
        """Keys what is random, the same at both ends: the step. None: the payload's sequence number."""
        self._num_encoded = 0
        self._num_decoded = 0

    def encode(self, tensor: Tensor, sample_ids: Sequence[int] = ()) -> Payload:
        """Return the payload of a tensor of up to four dimensions; the tensor may be changed afterwards.

        `sample_ids` name the samples along its first dimension; none: the data has no identity (gradients,
        validation). Raise CodecError for numbers that can't be encoded.
        """
        _check_encodable(self.spec.family, tensor)
        first = self._first_visits(tensor.shape, sample_ids)
        shape = tuple(tensor.shape)
        num_body_bytes = wire.body_bytes(self.spec, shape, first.bit_count(), self.bits)
        payload = new_payload(wire.HEADER_BYTES + num_body_bytes, is_pinned=tensor.is_cuda)
        body = payload[wire.HEADER_BYTES :]
        self._write_body(tensor, sample_ids, first, body)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        self._check_body(body, shape, first)
        header = wire.Header(
            codec=self.spec.family,
            bits=self.bits,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=shape,
            sequence=self._num_encoded,
            body_bytes=num_body_bytes,
            stream=self.stream,
            group_size=self.spec.group_size,
            first=first,
        ).sealed(body.numpy().data)
        payload.numpy().data[: wire.HEADER_BYTES] = header.pack()
        self._num_encoded += 1
        return payload

    def decode(self, payload: Payload, sample_ids: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor in its own dtype, 64-byte aligned; it may lie in the payload's memory, which it takes over.

        Raise ChannelError for a payload that is damaged, of another codec or stream, or not the next one.
        """
        header = self._check(payload, sample_ids)
        self._num_decoded += 1
        return self._read_body(header, payload[wire.HEADER_BYTES :].to(device), sample_ids)

    def pass_over(self) -> None:
        """Count a payload as decoded that this end has no need to see."""
        self._num_decoded += 1

    @abstractmethod
    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], first: int, body: Tensor) -> None:
        """Fill `body` (uint8, of the size that wire.body_bytes says); every byte of it.

        Where the tensor is on a GPU the body is pinned, and is filled once the current stream is done.
        """

    def _check_body(self, body: Tensor, shape: tuple[int, ...], first: int) -> None:  # noqa: B027  most need no check
        """Raise CodecError where a body that was filled must not be sent."""

    @abstractmethod
    def _read_body(self, header: wire.Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        """Return the tensor that `body` holds, on the device where it lies."""

    def _first_visits(self, shape: Sequence[int], sample_ids: Sequence[int]) -> int:
        """Return a bit for each sample that goes as a first visit; codecs without a memory have none."""
        return 0

    def measure(self, tensor: Tensor, sample_ids: Sequence[int]) -> Loss | None:
        """Return what encoding this tensor now would lose; None where nothing is quantized. Changes nothing."""
        return None

    def view(self, sample_ids: Sequence[int]) -> bytes:
        """Return what this end holds for the samples that come next, and the bits it wants."""
        return _VIEW_HEAD.pack(self.wanted_bits)

    def agree(self, sample_ids: Sequence[int], own: bytes, other: bytes) -> None:
        """Settle on the more careful of both ends' views; raise ChannelError where they are not of the same samples."""
        if len(own) != len(other):
            raise ChannelError(
                f"the other end looks at other samples (its view has {len(other)} bytes, not {len(own)})"
            )
        agreed = max(*_VIEW_HEAD.unpack_from(own), *_VIEW_HEAD.unpack_from(other))
        known = bits_of(self.spec.kind)
        if agreed != self.spec.bits and agreed not in known:
            raise ChannelError(f"the other end wants {agreed} bits (expected one of {', '.join(map(str, known))})")
        self.bits = self.wanted_bits = agreed

    def _check(self, payload: Payload, sample_ids: Sequence[int]) -> wire.Header:
        data = payload.numpy().data
        header = wire.unpack_header(data)
        first = self._first_visits(header.shape, sample_ids)
        num_bytes = wire.HEADER_BYTES + wire.body_bytes(self.spec, header.shape, first.bit_count(), self.bits)
        for what, got, expected in (
            ("codec", header.codec, self.spec.family),
            ("number of bits", header.bits, self.bits),
            ("group size", header.group_size, self.spec.group_size),
            ("stream", header.stream, self.stream),
            ("sequence number", header.sequence, self._num_decoded),
            ("set of first visits", f"{header.first:b}", f"{first:b}"),
            ("size", data.nbytes, num_bytes),
        ):
            if got != expected:
                raise ChannelError(f"payload has another {what} (got {got}, expected {expected}); the workers disagree")
        header.check_body(data[wire.HEADER_BYTES :])
        return header


def new_payload(num_bytes: int, *, is_pinned: bool = False) -> Payload:
    """Return new memory, 64-byte aligned; pinned for a GPU to write to (torch keeps and reuses such memory).

    numpy asks for huge pages where torch doesn't: receiving 6.5 MB payloads over localhost costs 0.40 s of system time
    per GB with them and 0.85 s without, because fresh memory is touched in small pages then (measured).
    """
    if is_pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = np.empty(num_bytes + 63, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + num_bytes])


def _check_encodable(family: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_NAMES:
        raise CodecError(f"'{family}' can't encode {tensor.dtype} (expected one of {', '.join(DTYPES)})")
    if tensor.dim() > wire.MAX_DIMS:
        raise CodecError(
            f"'{family}' can't encode {tensor.dim()} dimensions (expected at most {wire.MAX_DIMS}); flatten"
        )


def prepare_codecs(names: Iterable[str]) -> None:
    """Compile what codecs of these names run on a CPU, before a message waits for it: seconds, once on a machine."""
    specs = [parse_codec(name) for name in names]
    specs += [parse_codec(spec.first) for spec in specs if spec.remembers]
    warm_up({spec.kind for spec in specs})


MakeCodec: TypeAlias = Callable[[CodecSpec, int, int], Codec]


def make_codec(name: str, stream: int = 0, *, seed: int = 0) -> Codec:
    """Return a new codec by name, one without a memory; raise ConfigError for an unknown one.

    `seed` keys what is random (rotations, stochastic rounding, masks): the same at both ends.
    """
    from wantrain.codecs.cocktail import CocktailCodec  # here, not above: they need the contract first
    from wantrain.codecs.quantized import QuantizedCodec
    from wantrain.codecs.raw import RawCodec

    spec = parse_codec(name)
    kinds: dict[str, MakeCodec] = {
        "raw": RawCodec,
        "quantized": QuantizedCodec,
        "hadamard": QuantizedCodec,
        "cocktail": CocktailCodec,
    }
    own = own_codec(spec.kind)
    make = kinds.get(spec.kind) if own is None else own.make
    assert make is not None, f"'{name}' needs a message buffer"
    return make(spec, stream, seed)
