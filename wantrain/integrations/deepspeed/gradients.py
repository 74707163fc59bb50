"""The average of weight gradients over a DeepSpeed engine's data group, through a codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wantrain.integrations.averager import Averager, host_values


class GradientAverage:
    """Takes the place of an engine's `allreduce_bucket`. What a codec owes of a bucket is added in the next step."""

    def __init__(self, engine: Any, averager: Averager) -> None:
        self.averager = averager
        self._engine, self._own = engine, engine.allreduce_bucket
        self._group = engine.grid.get_data_parallel_group()
        self._residuals: list[Tensor] = []
        self._num_buckets = 0
        engine.allreduce_bucket = self._average_bucket

    def begin_step(self, step: int) -> None:
        """Count buckets from here: they are the same in every step."""
        self.averager.begin_step(step)
        self._num_buckets = 0

    def _average_bucket(self, bucket: Sequence[Tensor], dp_group: Any, dp_world_size: float | None = None) -> Tensor:
        """Return the average of some gradients over the data group, flat; those of experts go DeepSpeed's way."""
        if dp_group is not self._group:
            own: Tensor = self._own(bucket, dp_group, dp_world_size)
            return own
        flat: Tensor = self._engine.flatten(bucket)
        values = host_values(flat)
        if self._engine.gradient_average:
            values.div_(self.averager.world_size)
        for handle in self.averager.start(values, self._residual(values)):
            handle.wait(self.averager.timeout_s)
        return flat if values is flat else flat.copy_(values)

    def _residual(self, values: Tensor) -> Tensor | None:
        if not self.averager.needs_residuals:
            return None
        if self._num_buckets == len(self._residuals):
            self._residuals.append(torch.zeros_like(values))
        self._num_buckets += 1
        return self._residuals[self._num_buckets - 1]

    def close(self, patience_s: float) -> None:
        """Give the engine its own average back."""
        del self._engine.allreduce_bucket
        self.averager.close(patience_s)
