"""The guard: measures once a step, asks for more bits where too much is lost."""

from __future__ import annotations

import torch

from wantrain.codecs.codec import make_codec
from wantrain.pipeline.guard import Guard


def test_one_payload_a_step_is_measured_and_all_are_the_codecs() -> None:
    codec, plain = make_codec("quantized:4"), make_codec("quantized:4")
    guard = Guard(codec)
    first, second = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 64)
    assert torch.equal(guard.encode(first, [1, 2], 0), plain.encode(first, [1, 2]))
    measured = guard.last
    assert measured is not None
    assert 0.05 < measured.relative_error < 0.15
    guard.encode(second, [3, 4], 0)
    assert guard.last is measured
    guard.encode(second, [3, 4], 1)
    assert guard.last is not None
    assert guard.last.relative_error == 0


def test_more_bits_are_asked_for_once_until_they_are_agreed_on() -> None:
    said: list[str] = []
    codec = make_codec("quantized:4")
    guard = Guard(codec, 0.05, said.append)
    tensor = torch.randn(2, 64)
    guard.encode(tensor, [1, 2], 7)
    guard.encode(tensor, [1, 2], 8)
    assert (codec.bits, codec.wanted_bits) == (4, 6)
    assert len(said) == 1
    assert said[0].startswith("step 7: relative error 0.")
    assert said[0].endswith("is above 0.05; 4 → 6 bits from the next step")
    codec.agree([], codec.view([]), codec.view([]))
    guard.encode(tensor, [1, 2], 9)
    assert (guard.bits, codec.wanted_bits) == (6, 6)


def test_without_a_limit_bits_stay() -> None:
    codec = make_codec("quantized:2")
    Guard(codec).encode(torch.randn(2, 64), [1, 2], 0)
    assert codec.wanted_bits == 2


def test_what_can_not_be_measured_is_not() -> None:
    guard = Guard(make_codec("raw:bf16"), 1e-9)
    guard.encode(torch.randn(2, 64), [1, 2], 0)
    assert guard.last is None
