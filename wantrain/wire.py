"""What a tensor looks like between two workers: sizes, the header in front of it, how many connections carry it.

Pure arithmetic on plain values, so that the scheduler, the simulator, the channels and the codecs all count the same
bytes. One payload is one message:

    0      4       6     8    9     10   11     12         16          32       40         48      56       64
    | magic|version|codec|bits|dtype|rank|stream|group_size|shape[4]   |sequence|body_bytes|first  |checksum| body …

The header has 64 bytes, so a body in a 64-byte aligned buffer is aligned too, and a decoded tensor may lie in it.
`first` has a bit for each sample that is sent as a first visit. The checksum is xxh3_64 of the body, seeded with the
xxh3_64 of the fields before it: it covers both. What a body holds is in `kernels/README.md`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Self

import xxhash

from wantrain.codec_spec import CodecSpec, own_codec, own_kind, parse_codec
from wantrain.errors import ChannelError, ConfigError

HEADER_BYTES = 64
VERSION = 2
MAX_DIMS = 4
MAX_CONNECTIONS = 16
"""Chosen: 16 connections carry 1 Gbit/s over 128 ms one way; more would mostly add threads."""

_MAGIC = b"wtrn"
_FIELDS = struct.Struct("<4sHHBBBBI4IQQQ")
_CHECKSUM = struct.Struct("<Q")

CONNECTION_BYTES_PER_ROUND_TRIP = 2.0e6
"""What one gloo connection carries in a round trip: 2.7 MB measured (216 Mbit/s at 50 ms one way: Linux's default
4 MB send buffer less its bookkeeping). A quarter less, because a connection that lost a packet falls behind."""

CHUNK_BYTES = 512 * 1024
"""Greatest chunk. Measured on localhost: below 256 KiB a chunk's fixed cost (two thread wake-ups) shows."""

_CHUNK_S = 0.008
"""Chosen: three chunks are under way, and what a payload ready next sends beside them makes the earlier one late.
GPT-2 XL's shapes over 100 Mbit/s, fw3 bw6: 4.20 s a step with 16 ms, 4.10 with 8 (measured at the same depth)."""

_MIN_CHUNK_BYTES = 64 * 1024


CODEC_NUMBERS = {"raw:fp32": 1, "raw:bf16": 2, "raw:fp16": 3, "quantized": 4, "hadamard": 5, "aqsgd": 6, "cocktail": 7}
"""What a header calls a codec's family."""

_CODEC_NAMES = {number: name for name, number in CODEC_NUMBERS.items()}
DTYPE_NUMBERS = {"fp32": 1, "bf16": 2, "fp16": 3}
_DTYPE_NAMES = {number: name for name, number in DTYPE_NUMBERS.items()}

MAX_REMEMBERED = 64
"""A header has this many bits for samples that are sent as first visits."""


def payload_bytes(codec_name: str, shape: tuple[int, ...], num_first: int = 0, bits: int | None = None) -> int:
    """Return the size of a payload, header included, of a tensor of this shape.

    `num_first`: how many of the tensor's samples (its first dimension) are first visits, for codecs that tell them
    apart. `bits` overrides the name's.
    """
    return HEADER_BYTES + body_bytes(parse_codec(codec_name), shape, num_first, bits)


def body_bytes(spec: CodecSpec, shape: tuple[int, ...], num_first: int = 0, bits: int | None = None) -> int:
    """Return the size of a body; see `payload_bytes`."""
    bits = spec.bits if bits is None else bits
    own = own_codec(spec.kind)
    if own is not None:
        return own.body_bytes(shape, bits)
    if spec.kind == "raw":
        return math.prod(shape) * spec.bits // 8
    if spec.kind == "cocktail":
        return sum(cocktail_parts(spec, math.prod(shape)))
    if spec.kind == "aqsgd":
        num_samples, each = (shape[0], shape[1:]) if shape else (1, shape)
        first, later = body_bytes(parse_codec(spec.first), each), quantized_bytes(each, bits, spec.group_size)
        return num_first * aligned(first) + (num_samples - num_first) * aligned(later)
    return quantized_bytes(shape, bits, spec.group_size)


def quantized_bytes(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    """Return the bytes of scales and codes: a bf16 per group, and `bits` bytes for every eight values of a row."""
    rows, length = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    return aligned(2 * rows * math.ceil(length / group_size)) + rows * math.ceil(length / 8) * bits


def cocktail_parts(spec: CodecSpec, num_values: int) -> tuple[int, int]:
    """Return the bytes of the bitmap over the masked values (none where all are kept), and of the values kept."""
    masked = math.ceil(num_values / round(1 / spec.mask))
    kept = math.ceil(masked * spec.top)
    bitmap_bytes = aligned(math.ceil(masked / 8)) if spec.top < 1 else 0
    return bitmap_bytes, quantized_bytes((kept,), spec.bits, spec.group_size)


def aligned(num_bytes: int) -> int:
    """Return the next multiple of 16: parts of a body begin there."""
    return -(-num_bytes // 16) * 16


@dataclass(frozen=True)
class Header:
    """The first 64 bytes of a payload. `codec` is the family; `dtype` is the tensor's before encoding; `stream` tells
    kinds of payload apart that share a channel; `first` has a bit for each sample that is a first visit."""

    codec: str
    bits: int
    dtype: str
    shape: tuple[int, ...]
    sequence: int
    body_bytes: int
    stream: int = 0
    group_size: int = 0
    first: int = 0
    checksum: int = 0

    def sealed(self, body: memoryview) -> Self:
        """Return the header with the checksum of itself and `body`."""
        return replace(self, checksum=self._checksum(body))

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        return self._pack_fields() + _CHECKSUM.pack(self.checksum)

    def check_body(self, body: memoryview) -> None:
        """Raise ChannelError where the body is not the one that was sealed."""
        if len(body) != self.body_bytes:
            raise ChannelError(f"payload body was cut (got {len(body)} bytes, expected {self.body_bytes})")
        found = self._checksum(body)
        if found != self.checksum:
            raise ChannelError(
                f"payload {self.sequence} was damaged on the way (checksum {found:016x}, expected {self.checksum:016x})"
            )

    def _pack_fields(self) -> bytes:
        return _FIELDS.pack(
            _MAGIC,
            VERSION,
            _codec_number(self.codec),
            self.bits,
            DTYPE_NUMBERS[self.dtype],
            len(self.shape),
            self.stream,
            self.group_size,
            *self.shape,
            *[0] * (MAX_DIMS - len(self.shape)),
            self.sequence,
            self.body_bytes,
            self.first,
        )

    def _checksum(self, body: memoryview) -> int:
        return xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(self._pack_fields()))


def _codec_number(family: str) -> int:
    own = own_codec(family)
    return CODEC_NUMBERS[family] if own is None else own.number


def unpack_header(data: memoryview) -> Header:
    """Read the header of a payload; raise ChannelError that names the first thing that is not as it must be."""
    if len(data) < HEADER_BYTES:
        raise ChannelError(f"payload is shorter than its header (got {len(data)} bytes, expected {HEADER_BYTES})")
    magic, version, codec, bits, dtype, rank, stream, group_size, *rest = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise ChannelError(f"payload doesn't start as one (got {magic!r}, expected {_MAGIC!r})")
    if version != VERSION:
        raise ChannelError(f"payload has version {version} (expected {VERSION}); run one wantrain on all workers")
    name = _CODEC_NAMES.get(codec) or own_kind(codec)
    if name is None or dtype not in _DTYPE_NAMES or rank > MAX_DIMS:
        raise ChannelError(f"payload header was damaged (codec {codec}, dtype {dtype}, {rank} dimensions)")
    *shape, sequence, num_body_bytes, first = rest
    if any(shape[rank:]):
        raise ChannelError("payload header was damaged (bytes that must be zero are not)")
    return Header(
        codec=name,
        bits=bits,
        dtype=_DTYPE_NAMES[dtype],
        shape=tuple(shape[:rank]),
        sequence=sequence,
        body_bytes=num_body_bytes,
        stream=stream,
        group_size=group_size,
        first=first,
        checksum=_CHECKSUM.unpack_from(data, _FIELDS.size)[0],
    )


@dataclass(frozen=True)
class Transport:
    """How a channel moves its bytes; both ends must use the same."""

    num_connections: int = 1
    chunk_bytes: int = CHUNK_BYTES
    num_posted: int = 8
    """Receives posted ahead on each connection: a sender can't have more chunks under way on it than this."""

    def __post_init__(self) -> None:
        if not (1 <= self.num_connections <= MAX_CONNECTIONS and self.chunk_bytes > 0 and self.num_posted >= 2):
            raise ConfigError(
                f"transport can't work (got {self}, expected 1 to {MAX_CONNECTIONS} connections, chunks of at least "
                "one byte, 2 or more posted receives)"
            )

    @property
    def window_bytes(self) -> int:
        """Return the greatest number of bytes under way in one direction."""
        return self.num_connections * self.num_posted * self.chunk_bytes


def num_connections_for(bandwidth_bytes_per_s: float, latency_s: float) -> int:
    """Return how many connections fill a link: rate × round trip, by what one connection carries in a round trip."""
    under_way_bytes = bandwidth_bytes_per_s * 2 * latency_s
    return min(max(math.ceil(under_way_bytes / CONNECTION_BYTES_PER_ROUND_TRIP), 1), MAX_CONNECTIONS)


def transport_for(bandwidth_bytes_per_s: float, latency_s: float) -> Transport:
    """Return the transport that fills a link and keeps no more bytes under way than that takes.

    The window is rate × round trip and two chunks: a credit for the next chunk needs a round trip. A wider one gains
    nothing, and what a slow connection has taken on then comes late (measured at 1 Gbit/s and 50 ms: singles of 64 MB
    840 Mbit/s with 18 MB of window over seven connections, 800 with 33 MB).
    """
    num_connections = num_connections_for(bandwidth_bytes_per_s, latency_s)
    chunk_bytes = min(max(int(bandwidth_bytes_per_s * _CHUNK_S), _MIN_CHUNK_BYTES), CHUNK_BYTES)
    window_bytes = bandwidth_bytes_per_s * 2 * latency_s / num_connections
    return Transport(num_connections, chunk_bytes, 2 + max(1, math.ceil(window_bytes / chunk_bytes)))
