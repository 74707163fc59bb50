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

from wantrain.comm.allreduce import Handle, Reducer, piece_bounds
from wantrain.comm.channel import Channel
from wantrain.comm.loopback import loopback_pair
from wantrain.errors import ChannelError, CodecError

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
    ends: list[Channel] = []

    def make(num_members: int, codec: str = "raw:fp32") -> list[Reducer]:
        mesh = full_mesh(num_members, loopback)
        group = [Reducer(i, channels, TIMEOUT_S, codec) for i, channels in enumerate(mesh)]
        made.extend(group)
        ends.extend(channel for channels in mesh for channel in channels.values())
        return group

    yield make
    with ThreadPoolExecutor(len(ends) or 1) as pool:  # a reducer that failed waits for nothing then
        list(pool.map(lambda channel: channel.close(TIMEOUT_S), ends))
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
    buckets = [[bucket(999, member)] for member in range(3)]
    exact = buckets[0][0] + buckets[1][0] + buckets[2][0]
    reduce_all(make_group(3, "raw:bf16"), buckets)
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


CODECS = [
    "raw:bf16",
    "quantized:4",
    "error_feedback:raw:bf16",
    "error_feedback:quantized:4",
    "error_feedback:quantized:3,rounding=stochastic",
    "error_feedback:hadamard:2",
    "error_feedback:cocktail:4",
]


def reduce_steps(
    group: list[Reducer], num_steps: int, num_values: int = 5000, late: int | None = None
) -> list[list[Tensor]]:
    """Sum a bucket of each member in some steps; return the sums by step and member. One member may always be late."""
    residuals = [torch.zeros(num_values) for _ in group]
    sums = []
    for step in range(num_steps):
        order = sorted(range(len(group)), key=lambda member: member == late)
        handles: dict[int, Handle] = {}
        for member in order:
            group[member].begin_step(step)
            owed = residuals[member] if group[member].needs_residuals else None
            handles[member] = group[member].submit(bucket(num_values, 100 * step + member), owed)
        sums.append([handles[member].wait(TIMEOUT_S) for member in range(len(group))])
    return [*sums, residuals]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_members", [2, 3])
def test_all_members_get_the_same_bits_whoever_comes_last(
    make_group: Callable[..., list[Reducer]], codec: str, num_members: int
) -> None:
    runs = [reduce_steps(make_group(num_members, codec), 4, late=late) for late in (0, num_members - 1)]
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for step in runs[0][:-1]:
        assert all(torch.equal(own, step[0]) for own in step)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.startswith("error_feedback")])
def test_the_sums_and_what_all_members_owe_are_all_that_was_given(
    make_group: Callable[..., list[Reducer]], codec: str
) -> None:
    num_steps, num_members = 20, 3
    *sums, residuals = reduce_steps(make_group(num_members, codec), num_steps)
    seeds = [100 * step + member for step in range(num_steps) for member in range(num_members)]
    given_sum = torch.stack([bucket(5000, seed) for seed in seeds]).double().sum(dim=0)
    arrived = torch.stack([step[0] for step in sums]).double().sum(dim=0)
    owed = torch.stack(residuals).double().sum(dim=0)
    torch.testing.assert_close(arrived + owed, given_sum, rtol=0, atol=1e-4)


def test_a_plain_bucket_is_exact_between_compressed_ones_and_leaves_the_residual(
    make_group: Callable[..., list[Reducer]],
) -> None:
    group = make_group(2, "error_feedback:quantized:2")
    residuals = [torch.zeros(1000), torch.zeros(1000)]
    for is_plain in (True, False, True):
        before = [residual.clone() for residual in residuals]
        handles = [group[i].submit(bucket(1000, i), residuals[i], is_plain) for i in range(2)]
        found = [handle.wait(TIMEOUT_S) for handle in handles]
        assert torch.equal(*found)
        assert torch.equal(found[0], bucket(1000, 0) + bucket(1000, 1)) == is_plain
        assert all(map(torch.equal, before, residuals)) == is_plain


@pytest.mark.parametrize(
    ("codec", "times_fewer"),
    [
        ("raw:bf16", 2),
        ("error_feedback:quantized:8", 3.9),
        ("error_feedback:quantized:4", 7.7),
        ("error_feedback:quantized:2", 15),
        ("error_feedback:cocktail:4,mask=0.2", 85),
        ("error_feedback:cocktail:2,mask=0.167,top=1", 85),
        ("error_feedback:cocktail:4", 170),
    ],
)
def test_bytes_sent_against_fp32(codec: str, times_fewer: float) -> None:
    num_values = 200_000
    mesh = full_mesh(2, loopback)
    group = [Reducer(i, channels, TIMEOUT_S, codec) for i, channels in enumerate(mesh)]
    reduce_steps(group, 1, num_values)
    sent = mesh[0][1].stats.payload_bytes_sent
    assert 4 * num_values / sent >= 0.99 * times_fewer
    assert 4 * num_values / sent <= 1.06 * times_fewer
    for reducer in group:
        reducer.close(TIMEOUT_S)


def test_a_gradient_that_is_not_finite_is_said_to_be_of_its_bucket_and_step(
    make_group: Callable[..., list[Reducer]],
) -> None:
    reducer = make_group(2, "error_feedback:quantized:4")[0]
    reducer.begin_step(12)
    reducer.submit(torch.zeros(512), torch.zeros(512))
    bad = reducer.submit(torch.full((512,), float("nan")), torch.zeros(512))
    with pytest.raises(CodecError, match="bucket 1 of step 12: 'quantized:4' met NaN or infinity in 2 of 2 groups"):
        bad.wait(TIMEOUT_S)


def test_a_sum_that_overflows_is_said_to_be_one(make_group: Callable[..., list[Reducer]]) -> None:
    group = make_group(2, "error_feedback:quantized:4")
    handles = [reducer.submit(torch.full((512,), 3e38), torch.zeros(512)) for reducer in group]
    with pytest.raises(CodecError, match="the sum of bucket 0 of step 0: "):
        handles[0].wait(TIMEOUT_S)


def test_a_lone_member_keeps_its_bits_and_needs_no_residual(make_group: Callable[..., list[Reducer]]) -> None:
    (alone,) = make_group(1, "error_feedback:quantized:2")
    assert not alone.needs_residuals
    assert torch.equal(alone.submit(bucket(100, 0)).wait(TIMEOUT_S), bucket(100, 0))


def test_members_that_differ_on_what_is_plain_are_found_out(make_group: Callable[..., list[Reducer]]) -> None:
    group = make_group(2, "error_feedback:quantized:4")
    handles = [reducer.submit(torch.ones(512), torch.zeros(512), i == 0) for i, reducer in enumerate(group)]
    with pytest.raises(ChannelError, match="payload has another codec"):
        handles[0].wait(TIMEOUT_S)


def descend(group: list[Reducer], num_steps: int) -> Tensor:
    """Minimize a sum of two members' quadratics by gradient descent; return how far each coordinate is off."""
    curvature, targets = torch.logspace(-2, 0, 512), [bucket(512, 0), bucket(512, 1)]
    residuals = [torch.zeros(512), torch.zeros(512)]
    points = [torch.zeros(512), torch.zeros(512)]
    for step in range(num_steps):
        handles = []
        for i, reducer in enumerate(group):
            reducer.begin_step(step)
            grad = curvature * (points[i] - targets[i])
            handles.append(reducer.submit(grad, residuals[i] if reducer.needs_residuals else None))
        points = [point - 0.25 * handle.wait(TIMEOUT_S) for point, handle in zip(points, handles, strict=True)]
    assert torch.equal(*points)
    return points[0] - (targets[0] + targets[1]) / 2


def test_descent_with_feedback_ends_where_fp32_does_and_without_it_does_not(
    make_group: Callable[..., list[Reducer]],
) -> None:
    def distance(codec: str) -> float:
        return torch.linalg.vector_norm(descend(make_group(2, codec), 400)).item()

    exact, fed, bare = (distance(codec) for codec in ("raw:fp32", "error_feedback:quantized:4", "quantized:4"))
    print(f"distance after 400 steps: fp32 {exact:.4f}, with feedback {fed:.4f}, without {bare:.4f}")
    assert fed <= 1.1 * exact + 0.01
    assert bare >= 2 * fed
