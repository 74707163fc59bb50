"""Layers that take their time and pass tensors of the real shape, without the arithmetic.

A plan's whole life can then be tried on a small machine: pipeline, gradients and checkpoints are the real ones, only
what a GPU would compute is slept through. Every tensor differs from the one before, so that no codec gets off lightly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.split_backward import PostponedGradients, collector


class EmulatedLayer(nn.Module):
    """Sleeps for profiled seconds forwards and backwards; `num_parameters` weights get gradients.

    Where a schedule splits backwards, `weights_s` of a backward's seconds are slept when gradients of weights are made.

    Adding a gradient to those of earlier microbatches is part of a backward: its time is taken from the next sleep.
    """

    def __init__(
        self, shape: tuple[int, ...], forward_s: float, backward_s: float, num_parameters: int, weights_s: float = 0.0
    ) -> None:
        """`shape` is that of a sample's activation, in and out; the first layer takes tokens of any shape."""
        super().__init__()
        self.forward_s, self.backward_s, self.weights_s = forward_s, backward_s, weights_s
        self.weight = nn.Parameter(torch.randn(max(1, num_parameters)) * 0.02)
        self._output = torch.randn(*shape)  # no buffer: torch's DDP would send it to all replicas at every step
        self._weight_grad = torch.full((1,), 1e-3).expand(self.weight.shape)  # of one value: nothing to fill or read
        self._num_runs = 0
        self._returned_s = self._adding_s = 0.0
        self.weight.register_post_accumulate_grad_hook(self._has_added)  # type: ignore[no-untyped-call]

    def _has_added(self, _weight: Tensor) -> None:
        self._adding_s = time.monotonic() - self._returned_s

    def forward(self, inputs: Tensor) -> Tensor:
        """Return activations [microbatch, *shape] for as many samples as come in."""
        self._num_runs += 1
        if not inputs.is_floating_point():
            inputs = self._output.to(inputs.device).expand(len(inputs), *self._output.shape)
        postponed = collector()
        owner = self.weight if postponed is None else postponed.anchor
        output: Tensor = _Sleep.apply(inputs, owner, self, postponed)  # type: ignore[no-untyped-call]
        return output

    def make_grad(self, seconds: float) -> Tensor:
        """Return a gradient of the weights after `seconds`, or less where adding the last one took some."""
        end_s = time.monotonic() + seconds - self._adding_s
        time.sleep(max(0.0, end_s - time.monotonic()))
        self._returned_s = time.monotonic()
        return self._weight_grad.view_as(self.weight)


class _Sleep(torch.autograd.Function):
    """The values, shifted by one place more at every run; backwards likewise."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, _owner: Tensor, layer: EmulatedLayer, postponed: PostponedGradients | None
    ) -> Tensor:
        end_s = time.monotonic() + layer.forward_s
        ctx.layer, ctx.postponed = layer, postponed
        output = inputs.roll(layer._num_runs, dims=-1)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        layer = ctx.layer
        began_s = time.monotonic()
        grad = grads[0].roll(1, dims=-1)
        if ctx.postponed is None:
            return grad, layer.make_grad(layer.backward_s - (time.monotonic() - began_s)), None, None
        time.sleep(max(0.0, began_s + layer.backward_s - layer.weights_s - time.monotonic()))
        ctx.postponed.put_off(layer.weight, partial(layer.make_grad, layer.weights_s))
        return grad, None, None, None


class EmulatedUpdate(torch.optim.Optimizer):
    """An optimizer that takes its seconds and leaves the weights as they are."""

    def __init__(self, parameters: Iterable[nn.Parameter], step_s: float) -> None:
        """`step_s` seconds for all `parameters` together."""
        super().__init__(parameters, {})
        self.step_s = step_s

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Sleep."""
        time.sleep(self.step_s)


def emulated_loss(outputs: Tensor, _targets: Tensor) -> Tensor:
    """Return a loss whose gradient reaches every value."""
    return outputs.mean()
