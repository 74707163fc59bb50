"""One of torch's pipeline stages, whose sends and receives go through codecs: see `pipelining.py`.

A schedule calls seven methods of a stage, each for a microbatch; here they are answered first, and the stage's own are
called from there. Of a send or receive that the stage asks for only its tensor counts (`P2POp.tensor`): what is to be
encoded, or where torch will look for what was received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wantrain.errors import ConfigError
from wantrain.pipeline.boundary import Item
from wantrain.pipeline.executor import Neighbour

METHODS = (
    "clear_runtime_states", "get_fwd_recv_ops", "forward_one_chunk", "get_fwd_send_ops", "get_bwd_recv_ops",
    "backward_one_chunk", "get_bwd_send_ops",
)  # fmt: skip
"""What a schedule calls. Torch's documentation promises none of it; torch 2.11 and 2.13 have all of it, used alike."""


class Step(NamedTuple):
    """Which samples a step holds, by microbatch (none: nobody is to remember them), and those of the next, in order."""

    samples: Sequence[Sequence[int]] = ()
    upcoming: Sequence[int] | None = None
    number: int = 0

    @property
    def flat(self) -> list[int]:
        return [sample_id for one in self.samples for sample_id in one]

    def item(self, microbatch: int) -> Item:
        """Name a microbatch's payload."""
        if not self.samples:
            return Item(microbatch, (), self.number)
        if microbatch >= len(self.samples):
            raise ConfigError(f"samples were given for {len(self.samples)} microbatches, and the schedule has more")
        return Item(microbatch, self.samples[microbatch], self.number)


class Side:
    """A stage's side towards a stage on another rank."""

    def __init__(self, neighbour: Neighbour, awaited: str) -> None:
        self._inbox, self._outbox = neighbour.inbox, neighbour.outbox
        self._awaited = awaited
        self._step = Step()
        self._num_put = self._num_expected = 0
        self._buffers: dict[int, Tensor] = {}

    def begin(self, step: Step) -> None:
        """Begin a step: tell the other end what this one holds of its samples, unless that was done a step ahead."""
        self._step, self._num_put, self._num_expected = step, 0, 0
        if step.samples:
            self._inbox.offer(step.flat)
            self._outbox.offer(step.flat)

    def put(self, microbatch: int, sends: Sequence[dist.P2POp]) -> list[dist.P2POp]:
        """Send what a codec carries; return what is left for torch."""
        own, others = _parted(sends)
        if own is not None:
            self._outbox.put(own.tensor.detach(), self._step.item(microbatch))
            self._num_put += 1
            if self._step.upcoming is not None and self._num_put == len(self._step.samples):
                self._outbox.offer(self._step.upcoming)
        return others

    def expect(self, microbatch: int, receives: Sequence[dist.P2POp]) -> list[dist.P2POp]:
        """Begin to receive and decode what a codec carries; return what is left for torch."""
        own, others = _parted(receives)
        if own is not None:
            self._buffers[microbatch] = own.tensor
            self._inbox.expect([self._step.item(microbatch)], f"{self._awaited} of step {self._step.number}")
            self._num_expected += 1
            if self._step.upcoming is not None and self._num_expected == len(self._step.samples):
                self._inbox.offer(self._step.upcoming)
        return others

    def fill(self, microbatch: int) -> None:
        """Wait for a microbatch's tensor and put it where torch looks for it."""
        buffer = self._buffers.pop(microbatch, None)
        if buffer is not None:
            with torch.no_grad():
                buffer.copy_(self._inbox.take(microbatch))


def _parted(ops: Sequence[dist.P2POp]) -> tuple[dist.P2POp | None, list[dist.P2POp]]:
    """Return the one transfer of floats, which a codec carries, and the others."""
    floats = [op for op in ops if op.tensor.is_floating_point()]
    if len(floats) > 1:
        raise ConfigError(f"a stage hands on {len(floats)} tensors of floats (expected one); join them into one")
    return (floats[0] if floats else None), [op for op in ops if not op.tensor.is_floating_point()]


class CodedStage:
    """One of torch's stages, whose methods are answered here first."""

    def __init__(
        self,
        stage: Any,
        upstream: Side | None,
        downstream: Side | None,
        remembers: str | None,
        begin: Callable[[], None],
    ) -> None:
        """`remembers` is a codec on either side that must be told the samples; `begin` is called when a step begins."""
        self._begin = begin
        self._stage, self._upstream, self._downstream, self._remembers = stage, upstream, downstream, remembers
        self._places = dict(stage.stage_index_to_group_rank)
        self._own = {name: getattr(stage, name) for name in METHODS}
        self.given: Step | None = None
        self._num_steps = 0
        for name in METHODS:
            setattr(stage, name, getattr(self, name))

    def clear_runtime_states(self) -> None:
        """Begin a step: schedules call this first, with `has_backward` set for the step."""
        self._own["clear_runtime_states"]()
        self._begin()
        if self._stage.stage_index_to_group_rank != self._places:
            raise ConfigError("the schedule placed stages on other ranks; make its Codecs after it, not before")
        given, self.given = self.given, None
        if given is None and self._remembers and self._stage.has_backward:
            raise ConfigError(f"'{self._remembers}' remembers samples; call begin_step with their ids before each step")
        step = (given or Step())._replace(number=self._num_steps)
        self._num_steps += self._stage.has_backward
        for side in (self._upstream, self._downstream):
            if side is not None:
                side.begin(step)

    def get_fwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        ops = self._own["get_fwd_recv_ops"](microbatch)
        return self._upstream.expect(microbatch, ops) if self._upstream is not None else ops

    def forward_one_chunk(self, microbatch: int, *args: Any, **kwargs: Any) -> Any:
        if self._upstream is not None:
            self._upstream.fill(microbatch)
        return self._own["forward_one_chunk"](microbatch, *args, **kwargs)

    def get_fwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        ops = self._own["get_fwd_send_ops"](microbatch)
        return self._downstream.put(microbatch, ops) if self._downstream is not None else ops

    def get_bwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        ops = self._own["get_bwd_recv_ops"](microbatch)
        return self._downstream.expect(microbatch, ops) if self._downstream is not None else ops

    def backward_one_chunk(self, microbatch: int, *args: Any, **kwargs: Any) -> Any:
        if self._downstream is not None:
            self._downstream.fill(microbatch)
        return self._own["backward_one_chunk"](microbatch, *args, **kwargs)

    def get_bwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        ops = self._own["get_bwd_send_ops"](microbatch)
        return self._upstream.put(microbatch, ops) if self._upstream is not None else ops
