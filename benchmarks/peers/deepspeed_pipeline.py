"""DeepSpeed's pipeline engine on emulated stages, over gloo.

A stage sleeps for the profiled seconds (`sleeping.py`); schedule (1F1B), sends and receives, gradient accumulation and
the step's bookkeeping are DeepSpeed's. Its optimizer gets one value per stage to update. With codecs its sends go
through wantrain's (`wantrain/integrations/deepspeed`), and every step holds the same samples.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from network_setting import Setting, System
from peers.sleeping import Peer, SleepingStage, cheap_loss
from wantrain.integrations.deepspeed import Compression, compress


class DeepSpeedPipeline(Peer):
    """One rank of DeepSpeed's pipeline engine; needs torch.distributed's default group."""

    def __init__(self, system: System, setting: Setting, rank: int) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule

        deepspeed.ops.__compatible_ops__ = {}  # one would pass tensors through shared memory, past the emulated network
        deepspeed.init_distributed("gloo")
        each_s = [seconds * setting.dilation for seconds in (setting.forward_s, setting.backward_s)]
        layers = [LayerSpec(SleepingStage, *each_s, setting.shape) for _ in range(setting.stages)]
        module = PipelineModule(layers, num_stages=setting.stages, loss_fn=cheap_loss, partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": setting.microbatches,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
            "zero_allow_untested_optimizer": True,
        }
        self._engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
        super().__init__([one for one in module.modules() if isinstance(one, SleepingStage)], setting.dilation)
        self._batches = _batches(setting.shape)
        self._compression = None if system.is_peer else _compress(self._engine, system, setting)

    def step(self) -> None:
        self._engine.train_batch(self._batches)

    def close(self) -> None:
        if self._compression is not None:
            self._compression.close()


def _compress(engine: Any, system: System, setting: Setting) -> Compression:
    return compress(
        engine,
        forward=system.forward,
        backward=system.backward,
        sample_ids=lambda _: range(setting.microbatches),
        bytes_per_s=setting.uplink_bytes_per_s,
        latency_s=setting.latency_s,
    )


def _batches(shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.repeat((torch.randn(shape, requires_grad=True), torch.zeros(1, 1)))
