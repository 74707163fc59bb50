"""The payload's size and header, and how many connections a link needs."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain import wire
from wantrain.errors import ChannelError, ConfigError

BODY = memoryview(bytes(range(24)))


def header(**changes: object) -> wire.Header:
    given: dict[str, object] = {
        "codec": "raw:fp32",
        "bits": 32,
        "dtype": "bf16",
        "shape": (2, 3),
        "sequence": 7,
        "body_bytes": 24,
    }
    return wire.Header(**(given | changes)).sealed(BODY)  # type: ignore[arg-type]


@pytest.mark.parametrize(("codec", "num_bytes"), [("raw:fp32", 24), ("raw:bf16", 12), ("raw:fp16", 12)])
def test_payload_bytes_are_header_and_values(codec: str, num_bytes: int) -> None:
    assert wire.payload_bytes(codec, (2, 3)) == wire.HEADER_BYTES + num_bytes


def test_payload_of_an_empty_tensor_is_its_header() -> None:
    assert wire.payload_bytes("raw:fp32", (0, 5)) == wire.HEADER_BYTES


def test_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown codec 'raw:fp23'.*did you mean 'fp32'"):
        wire.payload_bytes("raw:fp23", (1,))


def test_quantized_bytes_are_a_scale_a_group_and_bits_for_each_value() -> None:
    assert wire.payload_bytes("quantized:4,group=128", (1, 1024, 1600)) == 64 + 2 * 1024 * 13 + 1024 * 1600 // 2
    assert wire.payload_bytes("quantized:3,group=32", (3, 65)) == 64 + 32 + 3 * 9 * 3


def test_a_first_visit_counts_as_its_own_codec() -> None:
    later, first = wire.payload_bytes("aqsgd:4", (2, 64, 128)), wire.payload_bytes("aqsgd:4", (2, 64, 128), num_first=2)
    assert first == wire.payload_bytes("raw:fp32", (2, 64, 128))
    assert later == wire.payload_bytes("quantized:4", (2, 64, 128))
    assert wire.payload_bytes("aqsgd:4", (2, 64, 128), num_first=1) == 64 + (first + later) // 2 - 64
    assert wire.payload_bytes("aqsgd:4", (2, 64, 128), bits=8) == wire.payload_bytes("quantized:8", (2, 64, 128))


def test_cocktail_takes_an_eightyfifth_and_less() -> None:
    values = 4 * 2**20
    assert 85 * wire.payload_bytes("cocktail:4", (values,)) < wire.payload_bytes("raw:fp32", (values,))


def test_header_keeps_the_body_aligned() -> None:
    assert len(header().pack()) == wire.HEADER_BYTES
    assert wire.HEADER_BYTES % 64 == 0


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=99),
)
def test_unpack_inverts_pack(shape: list[int], sequence: int, stream: int, first: int, body: bytes) -> None:
    sealed = wire.Header("quantized", 4, "fp32", tuple(shape), sequence, len(body), stream, 64, first).sealed(
        memoryview(body)
    )
    found = wire.unpack_header(memoryview(sealed.pack()))
    assert found == sealed
    found.check_body(memoryview(body))


@given(st.integers(0, wire.HEADER_BYTES + 24 - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(place: int, flip: int) -> None:
    data = bytearray(header().pack() + bytes(BODY))
    data[place] ^= flip
    with pytest.raises(ChannelError):
        wire.unpack_header(memoryview(data)).check_body(memoryview(data)[wire.HEADER_BYTES :])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, b"nope", "doesn't start as one"), (4, struct.pack("<H", 9), "has version 9"), (6, b"\xff\xff", "codec 65535")],
)
def test_damaged_header_says_what_differs(place: int, value: bytes, message: str) -> None:
    data = bytearray(header().pack())
    data[place : place + len(value)] = value
    with pytest.raises(ChannelError, match=message):
        wire.unpack_header(memoryview(data))


def test_cut_payload_is_found() -> None:
    with pytest.raises(ChannelError, match="shorter than its header"):
        wire.unpack_header(memoryview(b"wtrn"))
    with pytest.raises(ChannelError, match="got 23 bytes, expected 24"):
        header().check_body(BODY[:23])


@pytest.mark.parametrize(
    ("bandwidth", "latency_s", "num_connections"),
    [(125e6, 0.0, 1), (12.5e6, 0.02, 1), (125e6, 0.05, 7), (1.25e9, 0.2, 16)],
)
def test_connections_cover_rate_times_round_trip(bandwidth: float, latency_s: float, num_connections: int) -> None:
    assert wire.num_connections_for(bandwidth, latency_s) == num_connections


@given(st.floats(1e4, 1e10), st.floats(0, 0.5))
def test_window_covers_rate_times_round_trip(bandwidth: float, latency_s: float) -> None:
    transport = wire.transport_for(bandwidth, latency_s)
    assert transport.window_bytes >= bandwidth * 2 * latency_s
    assert transport.num_connections <= wire.MAX_CONNECTIONS


def test_transport_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match="num_connections=17"):
        wire.Transport(num_connections=17)
