"""Both ends agree before they send."""

from __future__ import annotations

import pytest

from wantrain.codecs.codec import Codec, make_codec
from wantrain.comm.loopback import loopback_pair
from wantrain.errors import ChannelError, RunError
from wantrain.pipeline.agreement import Agreement


def make_ends() -> tuple[tuple[Agreement, Codec], tuple[Agreement, Codec]]:
    a, b = loopback_pair("a", "b")
    here, there = make_codec("quantized:4"), make_codec("quantized:4")
    return (Agreement(a, here, 5.0), here), (Agreement(b, there, 5.0), there)


def test_both_ends_take_the_more_careful_view() -> None:
    (a, here), (b, there) = make_ends()
    there.wanted_bits = 6
    a.offer([1, 2])
    b.offer([1, 2])
    a.settle()
    b.settle()
    assert here.bits == there.bits == 6


def test_what_was_offered_a_step_ahead_is_not_offered_again() -> None:
    (a, _), (b, there) = make_ends()
    for _ in range(3):
        a.offer([1, 2])
    b.offer([1, 2])
    b.settle()
    there.wanted_bits = 8
    b.offer([3])
    a.settle()
    a.offer([3])
    a.settle()
    b.settle()
    assert there.bits == 8


def test_samples_that_were_not_announced_are_refused() -> None:
    (a, _), _ = make_ends()
    a.offer([1, 2])
    with pytest.raises(RunError, match="not those announced"):
        a.offer([2, 1])


def test_nothing_is_settled_where_nothing_was_offered() -> None:
    (a, here), _ = make_ends()
    a.settle()
    assert here.bits == 4


def test_a_silent_other_end_is_named() -> None:
    a, _ = loopback_pair("a", "b")
    agreement = Agreement(a, make_codec("quantized:4"), 0.05)
    agreement.offer([1])
    with pytest.raises(ChannelError, match="awaited the view of the coming samples"):
        agreement.settle()
