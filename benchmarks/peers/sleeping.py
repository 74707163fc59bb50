"""A module that takes a stage's profiled seconds instead of computing: what every peer's pipeline is given.

It hands on tensors of the real shape with changing contents, as wantrain's `EmulatedStage` does, and notes when it was
at work. Where its backward is split, half of it belongs to the inputs and half to the weights, for schedules that put
these apart.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Whole(torch.autograd.Function):
    """Sleep on the way forward and on the way back, for inputs and weights at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return stage.work("forward", stage.forward_s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.stage.work("backward", ctx.stage.backward_s), torch.zeros(1), None


class _Inputs(torch.autograd.Function):
    """Sleep on the way forward, and half of the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return stage.work("forward", stage.forward_s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.stage.work("backward", ctx.stage.backward_s / 2), None


class _Weights(torch.autograd.Function):
    """Be zero, and sleep the other half of the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.stage.sleep("backward", ctx.stage.backward_s / 2)
        return torch.zeros(1), None


class SleepingStage(nn.Module):
    """Profiled seconds instead of layers."""

    def __init__(self, forward_s: float, backward_s: float, shape: tuple[int, ...], *, is_split: bool = False) -> None:
        super().__init__()
        self.forward_s, self.backward_s, self.is_split = forward_s, backward_s, is_split
        self.weight = nn.Parameter(torch.zeros(1))
        self.worked: list[tuple[str, float, float]] = []
        """What it did, with begin and end on the machine's monotonic clock."""
        self._source = torch.randn(*shape)
        self._num_runs = 0

    def work(self, kind: str, seconds: float) -> Tensor:
        """Return new contents after `seconds`."""
        begin_s = time.monotonic()
        self._num_runs += 1
        made = self._source.roll(self._num_runs, dims=-1)
        self.sleep(kind, seconds, begin_s)
        return made

    def sleep(self, kind: str, seconds: float, begin_s: float | None = None) -> None:
        """Wait until `seconds` after the beginning (default: now)."""
        begin_s = time.monotonic() if begin_s is None else begin_s
        time.sleep(max(0.0, begin_s + seconds - time.monotonic()))
        self.worked.append((kind, begin_s, time.monotonic()))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_split:
            out: Tensor = _Inputs.apply(x, self) + _Weights.apply(self.weight, self)  # type: ignore[no-untyped-call]
        else:
            out = _Whole.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return out


def cheap_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss whose gradient costs next to nothing: the stage replaces it anyway."""
    return output[..., 0].sum() + 0.0 * target.sum()


class Peer(ABC):
    """One rank of another program's pipeline over sleeping stages."""

    def __init__(self, modules: Sequence[SleepingStage], dilation: float) -> None:
        self._modules, self._dilation = modules, dilation

    @abstractmethod
    def step(self) -> None:
        """Play one step."""

    def close(self) -> None:  # noqa: B027  most leave with the process group
        """Part from the other ranks."""

    @property
    def coding_s(self) -> float:
        """Seconds of the last step's encoding and decoding on this rank, as they passed."""
        return 0.0

    def worked(self, begin_s: float) -> list[tuple[str, float, float]]:
        """Return what it did since it was last asked: begin and end, undilated, from `begin_s` on."""
        done = sorted((one for module in self._modules for one in module.worked), key=lambda one: one[1])
        for module in self._modules:
            module.worked.clear()
        return [(kind, (a - begin_s) / self._dilation, (b - begin_s) / self._dilation) for kind, a, b in done]
