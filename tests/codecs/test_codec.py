"""The contract of every codec."""

import re

import pytest
import torch

from wantrain import wire
from wantrain.codecs.codec import Codec, make_codec
from wantrain.errors import ChannelError, CodecError, ConfigError

LOSSLESS = ("raw:fp32", "raw:bf16", "raw:fp16")
NAMES = (
    *LOSSLESS,
    "quantized:8",
    "quantized:3,group=32",
    "quantized:6,rounding=stochastic",
    "hadamard:8,group=64",
    "hadamard:4,rounding=stochastic",
)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ends(name: str) -> tuple[Codec, Codec]:
    return make_codec(name), make_codec(name)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (2, 65), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_gives_shape_dtype_and_alignment_back(
    name: str, ends: tuple[Codec, Codec], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape).to(dtype)
    payload = ends[0].encode(tensor)
    assert payload.numel() == wire.payload_bytes(name, shape)
    found = ends[1].decode(payload)
    assert (found.shape, found.dtype) == (tensor.shape, dtype)
    assert found.data_ptr() % 64 == 0 or not tensor.numel()
    if name in LOSSLESS:
        torch.testing.assert_close(found, tensor, rtol=1 / 128, atol=1e-6)
    elif tensor.numel():
        bits = int(re.sub(r"\D.*", "", name.partition(":")[2]))
        largest = float(tensor.abs().max())
        assert float((found.float() - tensor.float()).abs().max()) <= 8 * largest / 2**bits


def test_encoding_leaves_the_tensor_free_to_change(ends: tuple[Codec, Codec]) -> None:
    tensor = torch.ones(100)
    payload = ends[0].encode(tensor)
    tensor.zero_()
    assert float(ends[1].decode(payload).min()) > 0.3


def test_lost_payload_is_found(ends: tuple[Codec, Codec]) -> None:
    ends[0].encode(torch.ones(3))
    with pytest.raises(ChannelError, match=r"another sequence number \(got 1, expected 0\)"):
        ends[1].decode(ends[0].encode(torch.ones(3)))


def test_damaged_body_is_found(ends: tuple[Codec, Codec]) -> None:
    payload = ends[0].encode(torch.ones(33))
    payload[wire.HEADER_BYTES + 5] ^= 1
    with pytest.raises(ChannelError, match="damaged on the way"):
        ends[1].decode(payload)


def test_cut_payload_is_found(ends: tuple[Codec, Codec]) -> None:
    with pytest.raises(ChannelError, match="another size"):
        ends[1].decode(ends[0].encode(torch.ones(33))[:-1])


def test_another_stream_is_found(name: str) -> None:
    with pytest.raises(ChannelError, match=r"another stream \(got 0, expected 1\)"):
        make_codec(name, stream=1).decode(make_codec(name).encode(torch.ones(3)))


def test_another_codec_is_found() -> None:
    with pytest.raises(ChannelError, match="another codec"):
        make_codec("raw:bf16").decode(make_codec("raw:fp32").encode(torch.ones(3)))


def test_dtypes_and_shapes_that_cannot_travel_are_refused(ends: tuple[Codec, Codec]) -> None:
    with pytest.raises(CodecError, match=r"can't encode torch\.int64"):
        ends[0].encode(torch.ones(3, dtype=torch.int64))
    with pytest.raises(CodecError, match="5 dimensions"):
        ends[0].encode(torch.ones(1, 1, 1, 1, 1))


def test_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fp16'"):
        make_codec("raw:fp61")
