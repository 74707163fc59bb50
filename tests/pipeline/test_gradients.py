import threading
from typing import Any

import pytest
import torch
from torch import nn

from tests.jobs import TIMEOUT_S, run_ranks
from wantrain.comm.allreduce import Handle, Reducer
from wantrain.comm.channel import Channel
from wantrain.comm.loopback import loopback_pair
from wantrain.pipeline.gradients import GradientBuckets


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False), nn.Linear(3, 2, bias=False))


class Watched(Reducer):
    """Notes the sizes of the buckets that were handed in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.submitted: list[int] = []

    def submit(self, bucket: torch.Tensor, *rest: Any) -> Handle:
        self.submitted.append(bucket.numel())
        return super().submit(bucket, *rest)


def finish_with_zeros(buckets: GradientBuckets, reducer: Watched, end: Channel) -> None:
    """Finish a step with another member, at the other end of the channel, that has nothing to add."""
    other = Reducer(1, {0: end}, TIMEOUT_S)
    handles = [other.submit(torch.zeros(size)) for size in reducer.submitted]
    buckets.finish(TIMEOUT_S)
    for handle in handles:
        handle.wait(TIMEOUT_S)
    closing = threading.Thread(target=other.close, args=(TIMEOUT_S,))
    closing.start()
    reducer.close(TIMEOUT_S)
    closing.join()


@pytest.mark.parametrize(("bucket_bytes", "num_buckets"), [(1, 3), (192, 2), (10_000, 1)])
def test_buckets_hold_whole_parameters_from_the_last_to_the_first(bucket_bytes: int, num_buckets: int) -> None:
    layers = make_layers()
    buckets = GradientBuckets(list(layers.parameters()), bucket_bytes)
    assert len(buckets.bucket_sizes_bytes) == num_buckets
    first, last = layers[0].weight.grad, layers[2].weight.grad
    assert first is not None
    assert last is not None
    assert last.data_ptr() == buckets.flat(0).data_ptr()
    assert first.data_ptr() % 64 == last.data_ptr() % 64 == 0


def test_gradients_add_up_over_microbatches_and_zero_begins_anew() -> None:
    layers = make_layers()
    buckets = GradientBuckets(list(layers.parameters()), 10_000)
    for _ in range(2):
        buckets.zero()
        for _ in range(3):
            layers(torch.ones(4, 5)).sum().backward()
    plain = make_layers()
    (3 * plain(torch.ones(4, 5)).sum()).backward()
    for got, expected in zip(layers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_a_bucket_leaves_when_its_last_gradient_is_in_and_not_before_the_last_backward() -> None:
    a, b = loopback_pair("a", "b")
    layers = make_layers()
    reducer = Watched(0, {1: a}, TIMEOUT_S)
    submitted = reducer.submitted
    buckets = GradientBuckets(list(layers.parameters()), 1, reducer)
    buckets.zero()
    layers(torch.ones(1, 5)).sum().backward()
    assert submitted == []
    buckets.arm()
    output = layers(torch.ones(1, 5)).sum()
    layers[0].weight.register_hook(lambda _: seen_at_first_layer.extend(submitted))
    seen_at_first_layer: list[int] = []
    output.backward()
    assert seen_at_first_layer == [16, 32]
    assert submitted == [16, 32, 48]
    finish_with_zeros(buckets, reducer, b)


def test_where_only_some_gradients_are_still_owed_a_bucket_waits_for_those_alone() -> None:
    a, b = loopback_pair("a", "b")
    layers = make_layers()
    reducer = Watched(0, {1: a}, TIMEOUT_S)
    submitted = reducer.submitted
    buckets = GradientBuckets(list(layers.parameters()), 1, reducer)
    buckets.zero()
    layers(torch.ones(1, 5)).sum().backward()
    buckets.arm({layers[1].weight})
    assert submitted == [16]
    torch.autograd.backward(layers[1].weight, torch.ones(3, 7))
    assert submitted == [16, 32, 48]
    finish_with_zeros(buckets, reducer, b)


def test_after_finish_every_member_holds_the_sum() -> None:
    ends, models = loopback_pair("a", "b"), [make_layers(), make_layers()]

    def body(rank: int) -> list[torch.Tensor]:
        layers = models[rank]
        reducer = Reducer(rank, {1 - rank: ends[rank]}, TIMEOUT_S)
        buckets = GradientBuckets(list(layers.parameters()), 100, reducer)
        buckets.zero()
        buckets.arm()
        layers(torch.full((1, 5), float(rank + 1))).sum().backward()
        buckets.finish(TIMEOUT_S)
        reducer.close(TIMEOUT_S)
        return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]

    one, other = run_ranks(2, body)
    alone = make_layers()
    (alone(torch.ones(1, 5)).sum() + alone(torch.full((1, 5), 2.0)).sum()).backward()
    for got, same, parameter in zip(one, other, alone.parameters(), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, parameter.grad)
