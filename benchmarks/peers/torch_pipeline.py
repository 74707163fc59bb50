"""torch's own pipelines on emulated stages: the schedules of torch.distributed.pipelining, over gloo.

With codecs (`torch 1F1B + aqsgd:4/quantized:8`) the stages are the same, with `wantrain.integrations.pipelining` in
them.

A stage sleeps for the profiled seconds (`sleeping.py`); schedule, sends and receives are torch's. The zero-bubble
schedule puts backwards of inputs and of weights apart, and needs two stages on every rank, of half the layers each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
)

from network_setting import Setting, System
from peers.sleeping import Peer, SleepingStage, cheap_loss
from wantrain.integrations.pipelining import Codecs
from wantrain.pipeline.boundary_codecs import CodecSettings

SINGLE = {"torch 1F1B": Schedule1F1B, "torch GPipe": ScheduleGPipe}
STAGES_PER_RANK = 2
"""Of the zero-bubble schedule."""


class TorchPipeline(Peer):
    """One rank of a pipeline under one of torch's schedules; needs torch.distributed's default group."""

    def __init__(self, system: System, setting: Setting, rank: int) -> None:
        name = system.schedule
        per_rank = 1 if name in SINGLE else STAGES_PER_RANK
        slower = setting.dilation / per_rank
        modules = [
            SleepingStage(
                setting.forward_s * slower, setting.backward_s * slower, setting.shape, is_split=name not in SINGLE
            )
            for _ in range(per_rank)
        ]
        super().__init__(modules, setting.dilation)
        stages: list[Any] = [
            _stage(module, rank + i * setting.stages, per_rank * setting.stages, setting.shape)
            for i, module in enumerate(modules)
        ]
        self._schedule: Any
        if name in SINGLE:
            self._schedule = SINGLE[name](stages[0], setting.microbatches, loss_fn=cheap_loss)
        else:
            self._schedule = ScheduleInterleavedZeroBubble(stages, setting.microbatches, loss_fn=cheap_loss)
        self._codecs = None
        if system.is_coded:
            settings = CodecSettings(sample_shape=setting.shape[1:])
            self._codecs = Codecs(
                stages, system.forward, system.backward, settings=settings,
                bytes_per_s=setting.uplink_bytes_per_s, latency_s=setting.latency_s,
            )  # fmt: skip
        self._samples = [[m] for m in range(setting.microbatches)]
        self._is_first, self._is_last = rank == 0, rank == setting.stages - 1
        self._batch = torch.randn(setting.microbatches, *setting.shape[1:])
        self._target = torch.zeros(setting.microbatches, 1)

    @property
    def coding_s(self) -> float:
        return self._codecs.recorder.seconds("encode", "decode") if self._codecs is not None else 0.0

    def close(self) -> None:
        if self._codecs is not None:
            self._codecs.close()

    def step(self) -> None:
        if self._codecs is not None:  # the next step holds the same samples
            self._codecs.begin_step(self._samples, range(len(self._samples)))
        if self._is_first:
            self._schedule.step(self._batch)
        elif self._is_last:
            self._schedule.step(target=self._target)
        else:
            self._schedule.step()


def _stage(module: SleepingStage, index: int, count: int, shape: tuple[int, ...]) -> PipelineStage:
    taken, given = torch.empty(shape, requires_grad=index > 0), torch.empty(shape, requires_grad=True)
    return PipelineStage(module, index, count, torch.device("cpu"), input_args=(taken,), output_args=(given,))
