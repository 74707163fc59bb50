"""Emulated layers: real shapes, real gradients, seconds as asked."""

import time

import torch

from wantrain.models.emulated import EmulatedLayer, emulated_loss


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


def test_tokens_become_activations_and_no_two_runs_are_alike() -> None:
    layer = EmulatedLayer((4, 8), 0.0, 0.0, 1)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    first, second = layer(tokens), layer(tokens)
    assert first.shape == (3, 4, 8)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
