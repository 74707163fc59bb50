"""DeepSpeed's pipeline engine on emulated stages, over gloo.

A stage sleeps for the profiled seconds (`sleeping.py`); schedule (1F1B), sends and receives, gradient accumulation and
the step's bookkeeping are DeepSpeed's. Its optimizer gets one value per stage to update.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from network_setting import Setting
from peers.sleeping import Peer, SleepingStage, cheap_loss


class DeepSpeedPipeline(Peer):
    """One rank of DeepSpeed's pipeline engine; needs torch.distributed's default group."""

    def __init__(self, setting: Setting, rank: int) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule

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

    def step(self) -> None:
        self._engine.train_batch(self._batches)


def _batches(shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.repeat((torch.randn(shape, requires_grad=True), torch.zeros(1, 1)))
