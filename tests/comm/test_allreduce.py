"""Sums over replicas: right, the same bits everywhere, several at once."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wantrain.codecs.codec import make_codec
from wantrain.comm.allreduce import Reducer, piece_bounds
from wantrain.comm.channel import Channel
from wantrain.comm.loopback import loopback_pair
from wantrain.errors import ChannelError

MakePair = Callable[..., tuple[Channel, Channel]]
TIMEOUT_S = 20.0
loopback: MakePair = partial(loopback_pair, "a", "b")


def full_mesh(num_members: int, make_pair: MakePair) -> list[dict[int, Channel]]:
    """Return each member's channels to the others."""
    channels: list[dict[int, Channel]] = [{} for _ in range(num_members)]
    for one in range(num_members):
        for two in range(one + 1, num_members):
            channels[one][two], channels[two][one] = make_pair()
    return channels


@pytest.fixture
def make_group() -> Iterator[Callable[..., list[Reducer]]]:
    made: list[Reducer] = []

    def make(num_members: int, **codecs: object) -> list[Reducer]:
        made.extend(Reducer(i, c, TIMEOUT_S, **codecs) for i, c in enumerate(full_mesh(num_members, loopback)))  # type: ignore[arg-type]
        return made

    yield make
    for reducer in made:
        reducer.close(TIMEOUT_S)


def bucket(num_values: int, seed: int) -> Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def reduce_all(group: list[Reducer], buckets: list[list[Tensor]]) -> None:
    """Submit `buckets[member]` in order on every member, and wait for all."""
    handles = [group[member].submit(one) for member, own in enumerate(buckets) for one in own]
    for handle in handles:
        handle.wait(TIMEOUT_S)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_pieces_cover_the_bucket_once(num_values: int, num_members: int) -> None:
    bounds = piece_bounds(num_values, num_members)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, num_values, num_members + 1)
    assert bounds == sorted(bounds)
    assert all(bound % 16 == 0 or bound == num_values for bound in bounds)


@pytest.mark.parametrize("num_members", [1, 2, 3, 5])
@pytest.mark.parametrize("num_values", [0, 1, 15, 17, 1000])
def test_every_member_gets_the_sum_in_member_order(
    make_group: Callable[..., list[Reducer]], num_members: int, num_values: int
) -> None:
    group = make_group(num_members)
    buckets = [[bucket(num_values, member)] for member in range(num_members)]
    expected = buckets[0][0].clone()
    for own in buckets[1:]:
        expected += own[0]
    reduce_all(group, buckets)
    for own in buckets:
        assert torch.equal(own[0], expected)


def test_many_buckets_at_once_keep_apart(make_group: Callable[..., list[Reducer]]) -> None:
    sizes = [100, 0, 5000, 1, 33, 20_000]
    buckets = [[bucket(size, 10 * member + i) for i, size in enumerate(sizes)] for member in range(3)]
    expected = [(buckets[0][i] + buckets[1][i]) + buckets[2][i] for i in range(len(sizes))]
    reduce_all(make_group(3), buckets)
    for own in buckets:
        assert all(torch.equal(found, sum_) for found, sum_ in zip(own, expected, strict=True))


def test_lossy_codecs_leave_the_same_bits_on_all_members(make_group: Callable[..., list[Reducer]]) -> None:
    narrow = partial(make_codec, "raw:bf16")
    buckets = [[bucket(999, member)] for member in range(3)]
    exact = buckets[0][0] + buckets[1][0] + buckets[2][0]
    reduce_all(make_group(3, scatter_codec=narrow, gather_codec=narrow), buckets)
    assert all(torch.equal(own[0], buckets[0][0]) for own in buckets)
    assert not torch.equal(buckets[0][0], exact)
    torch.testing.assert_close(buckets[0][0], exact, rtol=0.02, atol=0.05)


def test_members_may_submit_at_different_times(make_group: Callable[..., list[Reducer]]) -> None:
    group = make_group(2)
    early = [group[0].submit(torch.ones(100)) for _ in range(3)]
    late = [group[1].submit(torch.full((100,), 2.0)) for _ in range(3)]
    for handle in early + late:
        assert torch.equal(handle.wait(TIMEOUT_S), torch.full((100,), 3.0))


def test_sum_over_sockets(gloo_pair: MakePair) -> None:
    channels = full_mesh(3, gloo_pair)
    group = [Reducer(member, channels[member], TIMEOUT_S) for member in range(3)]
    buckets = [[bucket(300_001, 7 * member + i) for i in range(4)] for member in range(3)]
    expected = [(buckets[0][i] + buckets[1][i]) + buckets[2][i] for i in range(4)]
    reduce_all(group, buckets)
    for own in buckets:
        assert all(torch.equal(found, sum_) for found, sum_ in zip(own, expected, strict=True))
    for reducer in group:
        reducer.close(TIMEOUT_S)
    ends = [channel for own in channels for channel in own.values()]
    with ThreadPoolExecutor(len(ends)) as pool:
        list(pool.map(lambda channel: channel.close(TIMEOUT_S), ends))


def test_late_member_fails_every_open_bucket() -> None:
    mine, _ = loopback_pair("me", "silent")
    reducer = Reducer(0, {1: mine}, timeout_s=0.05)
    handles = [reducer.submit(torch.ones(4)) for _ in range(2)]
    start_s = time.monotonic()
    for handle in handles:
        with pytest.raises(ChannelError, match=r"no payload from 'silent' within 0\.05 s; awaited a piece of bucket 0"):
            handle.wait(TIMEOUT_S)
    with pytest.raises(ChannelError, match="silent"):
        reducer.submit(torch.ones(4))
    reducer.close(TIMEOUT_S)
    assert time.monotonic() - start_s < TIMEOUT_S / 2


def test_what_is_no_flat_fp32_bucket_is_refused(make_group: Callable[..., list[Reducer]]) -> None:
    with pytest.raises(ValueError, match="flat contiguous fp32"):
        make_group(1)[0].submit(torch.ones(2, 2))
