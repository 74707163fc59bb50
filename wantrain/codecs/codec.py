"""The contract between tensors and bytes: `encode` makes one message, `decode` on the other end gives the tensor back.

A codec instance is one end of one direction: it numbers what it encodes and expects the same numbers when it decodes,
so a payload lost, doubled or taken for another is found before its numbers are used. What arrives damaged is a
ChannelError; nothing is guessed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from wantrain import wire
from wantrain.errors import ChannelError, CodecError

Payload: TypeAlias = Tensor
"""One message: a contiguous one-dimensional uint8 CPU tensor, wire.HEADER_BYTES of header and then the body."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Codec(ABC):
    """One end of one direction between two workers. Not for use by two threads at once."""

    def __init__(self, name: str, stream: int = 0) -> None:
        self.name = name
        self.stream = stream
        self._form = wire.wire_format(name)
        self._num_encoded = 0
        self._num_decoded = 0

    def encode(self, tensor: Tensor, sample_ids: Sequence[int] = ()) -> Payload:
        """Return the payload of a tensor of up to four dimensions; the tensor may be changed afterwards."""
        _check_encodable(self.name, tensor)
        payload = new_payload(wire.payload_bytes(self.name, tuple(tensor.shape)))
        body = payload[wire.HEADER_BYTES :]
        self._write_body(tensor, sample_ids, body)
        header = wire.Header(
            codec=self.name,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            sequence=self._num_encoded,
            body_bytes=body.numel(),
            stream=self.stream,
        ).sealed(body.numpy().data)
        payload.numpy().data[: wire.HEADER_BYTES] = header.pack()
        self._num_encoded += 1
        return payload

    def decode(self, payload: Payload, sample_ids: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor in its own dtype, 64-byte aligned; it may lie in the payload's memory, which it takes over.

        Raise ChannelError for a payload that is damaged, of another codec or stream, or not the next one.
        """
        header = self._check(payload)
        self._num_decoded += 1
        return self._read_body(header, payload[wire.HEADER_BYTES :], sample_ids).to(device)

    @abstractmethod
    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], body: Tensor) -> None:
        """Fill `body` (uint8, of the size that wire.payload_bytes says)."""

    @abstractmethod
    def _read_body(self, header: wire.Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        """Return the tensor that `body` holds."""

    def _check(self, payload: Payload) -> wire.Header:
        data = payload.numpy().data
        header = wire.unpack_header(data)
        for what, got, expected in (
            ("codec", header.codec, self.name),
            ("stream", header.stream, self.stream),
            ("sequence number", header.sequence, self._num_decoded),
            ("size", data.nbytes, wire.payload_bytes(header.codec, header.shape)),
        ):
            if got != expected:
                raise ChannelError(f"payload has another {what} (got {got}, expected {expected}); the workers disagree")
        header.check_body(data[wire.HEADER_BYTES :])
        return header


def new_payload(num_bytes: int) -> Payload:
    """Return new memory, 64-byte aligned.

    numpy asks for huge pages where torch doesn't: receiving 6.5 MB payloads over localhost costs 0.40 s of system time
    per GB with them and 0.85 s without, because fresh memory is touched in small pages then (measured).
    """
    memory = np.empty(num_bytes + 63, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + num_bytes])


def _check_encodable(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPE_NAMES:
        raise CodecError(f"'{name}' can't encode {tensor.dtype} (expected one of {', '.join(DTYPES)})")
    if tensor.dim() > wire.MAX_DIMS:
        raise CodecError(f"'{name}' can't encode {tensor.dim()} dimensions (expected at most {wire.MAX_DIMS}); flatten")


def make_codec(name: str, stream: int = 0) -> Codec:
    """Return a new codec by name; raise ConfigError for an unknown one."""
    from wantrain.codecs.raw import RawCodec  # here, not above: raw.py needs the contract first

    wire.wire_format(name)
    return RawCodec(name, stream)
