"""torch's own pipeline on emulated stages: Schedule1F1B and ScheduleGPipe of torch.distributed.pipelining, over gloo.

A stage sleeps for the profiled seconds in forward and backward and hands on tensors of the real shape with changing
contents, exactly as wantrain's `EmulatedStage` does. Everything else is torch's: schedule, sends, receives.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

SCHEDULES = {"torch 1F1B": Schedule1F1B, "torch GPipe": ScheduleGPipe}


class _Work(torch.autograd.Function):
    """Sleep on the way forward and on the way back; the values are those of `source`, shifted each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return stage.work(stage.forward_s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.stage.work(ctx.stage.backward_s), torch.zeros(1), None


class SleepingStage(nn.Module):
    """Profiled seconds instead of layers."""

    def __init__(self, forward_s: float, backward_s: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.forward_s, self.backward_s = forward_s, backward_s
        self.weight = nn.Parameter(torch.zeros(1))
        self._source = torch.randn(*shape)
        self._num_runs = 0

    def work(self, seconds: float) -> Tensor:
        """Return new contents after `seconds`."""
        end_s = time.monotonic() + seconds
        self._num_runs += 1
        made = self._source.roll(self._num_runs, dims=-1)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return made

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Work.apply(x, self.weight, self)  # type: ignore[no-untyped-call]
        return out


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss whose gradient costs next to nothing: the stage replaces it anyway."""
    return output[..., 0].sum() + 0.0 * target.sum()


class TorchPipeline:
    """One rank of a pipeline under one of torch's schedules; needs torch.distributed's default group."""

    def __init__(
        self, name: str, rank: int, num_stages: int, num_microbatches: int, shape: tuple[int, ...],
        forward_s: float, backward_s: float,
    ) -> None:  # fmt: skip
        self._rank, self._num_stages = rank, num_stages
        module = SleepingStage(forward_s, backward_s, shape)
        taken = torch.empty(shape, requires_grad=rank > 0)
        given = torch.empty(shape, requires_grad=True)
        stage = PipelineStage(module, rank, num_stages, torch.device("cpu"), input_args=(taken,), output_args=(given,))
        self._schedule = SCHEDULES[name](stage, num_microbatches, loss_fn=_loss)
        self._batch = torch.randn(num_microbatches * shape[0], *shape[1:])
        self._target = torch.zeros(num_microbatches * shape[0], 1)

    def step(self) -> None:
        """Play one step."""
        if self._rank == 0:
            self._schedule.step(self._batch)
        elif self._rank == self._num_stages - 1:
            self._schedule.step(target=self._target)
        else:
            self._schedule.step()
