"""Emulated layers: real shapes, real gradients, seconds as asked."""

import time

import pytest
import torch

from wantrain.models.emulated import EmulatedLayer, EmulatedUpdate, emulated_loss
from wantrain.models.split_backward import PostponedGradients


def test_a_layer_takes_its_seconds_and_gives_gradients_to_inputs_and_weights() -> None:
    layer = EmulatedLayer((4, 8), 0.02, 0.05, 1000)
    inputs = torch.randn(2, 4, 8, requires_grad=True)
    began_s = time.monotonic()
    output = layer(inputs)
    forward_s = time.monotonic() - began_s
    emulated_loss(output, output).backward()
    assert forward_s >= 0.02
    assert time.monotonic() - began_s >= 0.07
    assert output.shape == inputs.shape
    assert inputs.grad is not None
    assert torch.count_nonzero(inputs.grad) == inputs.numel()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (1000,)


@pytest.mark.alone
def test_a_split_backward_makes_gradients_of_weights_later_in_their_own_seconds() -> None:
    layer = EmulatedLayer((4, 8), 0.0, 0.3, 1000, weights_s=0.2)
    postponed = PostponedGradients([layer])
    with postponed.collecting():
        output = layer(torch.randn(2, 4, 8, requires_grad=True))
    postponed.begin(0)
    began_s = time.monotonic()
    emulated_loss(output, output).backward()
    assert 0.1 <= time.monotonic() - began_s < 0.19
    assert layer.weight.grad is None
    began_s = time.monotonic()
    postponed.make(0)
    assert 0.2 <= time.monotonic() - began_s < 0.29
    assert layer.weight.grad is not None


@pytest.mark.alone
def test_adding_up_gradients_is_part_of_a_backward() -> None:
    layer = EmulatedLayer((1, 1), 0.0, 0.2, 10_000_000)
    inputs = torch.randn(1, 1, 1)
    outputs = [emulated_loss(layer(inputs), inputs) for _ in range(5)]
    began_s = time.monotonic()
    for output in outputs:
        output.backward()
    assert time.monotonic() - began_s == pytest.approx(5 * 0.2, rel=0.03)


def test_an_update_takes_its_seconds_and_leaves_the_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    began_s = time.monotonic()
    EmulatedUpdate([weight], 0.05).step()
    assert time.monotonic() - began_s >= 0.05
    assert weight.tolist() == [1, 1, 1]


def test_tokens_become_activations_and_no_two_runs_are_alike() -> None:
    layer = EmulatedLayer((4, 8), 0.0, 0.0, 1)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    first, second = layer(tokens), layer(tokens)
    assert first.shape == (3, 4, 8)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
