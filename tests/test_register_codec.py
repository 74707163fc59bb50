"""A codec of one's own: known by its name wherever codecs are named, refused where it says too little."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import wantrain as wt
from tests.jobs import small_plan, train_job
from wantrain import wire
from wantrain.codec_spec import bits_of, parse_codec, unregister_codec
from wantrain.errors import ChannelError, ConfigError
from wantrain.wire import Header


class Halves(wt.Codec):
    """Values as bf16: what raw:bf16 does."""

    def _write_body(self, tensor: Tensor, sample_ids: Sequence[int], first: int, body: Tensor) -> None:
        body.copy_(tensor.detach().bfloat16().reshape(-1).contiguous().view(torch.uint8))

    def _read_body(self, header: Header, body: Tensor, sample_ids: Sequence[int]) -> Tensor:
        return body.view(torch.bfloat16).float().reshape(header.shape)


def two_bytes_each(shape: tuple[int, ...], bits: int) -> int:
    return math.prod(shape) * bits // 8


@pytest.fixture
def halves() -> Iterator[None]:
    wt.register_codec("halves", Halves, body_bytes=two_bytes_each, bits=[16])
    yield
    unregister_codec("halves")


@pytest.mark.usefixtures("halves")
def test_it_goes_by_its_name_and_counts_its_own_bytes() -> None:
    assert wire.payload_bytes("halves", (3, 5)) == wire.HEADER_BYTES + 30
    assert parse_codec("halves") == parse_codec("halves:16")
    assert bits_of("halves") == (16,)
    sender, receiver = wt.make_codec("halves"), wt.make_codec("halves")
    tensor = torch.randn(3, 5)
    assert torch.equal(receiver.decode(sender.encode(tensor)), tensor.bfloat16().float())
    with pytest.raises(ChannelError, match="another codec"):
        wt.make_codec("raw:bf16").decode(wt.make_codec("halves").encode(tensor))


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("halves:8", "'halves' takes one of 16"),
        ("halves,group=64", "has no key 'group'; 'halves' takes none"),
        ("halvs", r"did you mean 'halves'\?"),
    ],
)
def test_what_it_does_not_have_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_codec(name)


@pytest.mark.parametrize(
    ("kind", "bits", "said"),
    [
        ("raw", [16], "a codec can't be called 'raw'"),
        ("error_feedback", [16], "a codec can't be called"),
        ("a,b", [16], "a codec can't be called"),
        ("halves", [], "needs bits per value from 1 to 32"),
        ("halves", [64], "needs bits per value from 1 to 32"),
    ],
)
def test_a_registration_that_can_not_be_is_refused(kind: str, bits: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wt.register_codec(kind, Halves, body_bytes=two_bytes_each, bits=bits)
    with pytest.raises(ConfigError, match="unknown codec"):
        parse_codec("halves")


@pytest.mark.usefixtures("halves")
def test_training_with_it_gives_the_bits_of_the_codec_that_does_the_same() -> None:
    codecs = ("halves", "raw:bf16")
    plans = [small_plan(2, 2, forward_codec=c, backward_codec=c, gradient_codec=c) for c in codecs]
    own, known = (train_job(plan, 3)[0].losses for plan in plans)
    assert own == known
    assert own[-1] != own[0]


@pytest.mark.usefixtures("halves")
def test_it_is_registered_anew() -> None:
    wt.register_codec("halves", Halves, body_bytes=two_bytes_each, bits=[8, 16])
    assert parse_codec("halves:8").bits == 8
