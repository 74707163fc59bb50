"""Codecs in a DeepSpeed pipeline engine's sends: one call after `deepspeed.initialize`, and all else stays as it is.

    engine, *_ = deepspeed.initialize(model=module, ...)
    compress(engine, forward="aqsgd:4", backward="quantized:8", sample_ids=lambda step: ids_of(step))

DeepSpeed's stages send and receive by calls that block: while bytes travel, nothing is computed. Here the four
instructions that move tensors between stages use wantrain's boxes: encoding, the wire and decoding go on in threads
while the stage computes. The schedule, 1F1B, stays DeepSpeed's.

    stage 0   F0 F1 . . B0 F2 …         RecvActivation, RecvGrad take from an inbox
              └put └put └take           SendActivation, SendGrad put into an outbox

A boundary is made ready with the first activation over it: DeepSpeed's own description of the tensor goes ahead, once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain.codec_spec import check_activation_codec, check_gradient_codec, parse_codec
from wantrain.codecs.codec import prepare_codecs
from wantrain.comm.groups import join_process_group
from wantrain.comm.sender import Sender
from wantrain.errors import ChannelError, ConfigError, RunError, WantrainError
from wantrain.integrations.averager import Averager
from wantrain.integrations.deepspeed.boundary import Boundary, Room, Settings, Step
from wantrain.integrations.deepspeed.gradients import GradientAverage
from wantrain.pipeline.boundary import Item
from wantrain.pipeline.recorder import Recorder
from wantrain.wire import transport_for

SampleIds = Callable[[int], Sequence[int]]
"""Names the samples of a step (from 0) that a process's replica trains on, in their order; the same on all stages."""

_AT_EXIT_S = 20.0
"""Chosen: stages end within seconds of each other, or not at all."""


def compress(
    engine: Any,
    *,
    forward: str = "aqsgd:4",
    backward: str = "quantized:8",
    gradients: str | None = None,
    sample_ids: SampleIds | None = None,
    seed: int = 0,
    ram_bytes: int = 1 << 30,
    folder: Path | None = None,
    file_bytes: int = 0,
    bytes_per_s: float = 125e6,
    latency_s: float = 0.02,
    timeout_s: float = 600.0,
) -> Compression:
    """Let a `PipelineEngine` send activations and their gradients through codecs, and weight gradients where asked.

    Every process calls it with the same arguments. `sample_ids` is needed where `forward` remembers samples, unless the
    engine was given its `training_data`. `gradients` names the codec of the data group's average (None: DeepSpeed's own
    all-reduce). What a process remembers may take `ram_bytes` of memory, then `file_bytes` in `folder`, one of its own;
    what finds no room is sent as a first visit again. `bytes_per_s` and one-way `latency_s` say how links are used, not
    how fast they are. `timeout_s`: how late another process may be.

    Raises ConfigError for what can't be done, ChannelError where a neighbour doesn't come.
    """
    check_activation_codec(forward, is_forward=True)
    check_activation_codec(backward, is_forward=False)
    if gradients is not None:
        check_gradient_codec(gradients)
    _check_engine(engine, forward, gradients)
    if parse_codec(forward).remembers and sample_ids is None:
        sample_ids = SamplesInOrder(engine, forward)
    if engine.device.type == "cpu":
        prepare_codecs([forward, backward, *([gradients] if gradients is not None else [])])
    settings = Settings(forward, backward, seed, transport_for(bytes_per_s, latency_s), timeout_s)
    compression = Compression(engine, settings, sample_ids, Room(ram_bytes, folder, file_bytes))
    if gradients is not None:
        group = engine.grid.get_data_parallel_group()
        link = {"bytes_per_s": bytes_per_s, "latency_s": latency_s, "timeout_s": timeout_s}
        compression.average(Averager(gradients, group, **link))
    return compression


class Compression:
    """What an engine's sends go through, on one process. Made by `compress`; the program's end closes it by itself."""

    def __init__(self, engine: Any, settings: Settings, sample_ids: SampleIds | None, room: Room) -> None:
        self._engine, self._sample_ids, self._timeout_s = engine, sample_ids, settings.timeout_s
        self._membership = join_process_group(engine.grid.get_pipe_parallel_group(), settings.timeout_s)
        stage = self._membership.rank
        self._recorder = Recorder(stage)
        numbers = [one for one in (stage - 1, stage) if 0 <= one < engine.num_stages - 1]
        sender = Sender(None)

        def connect(number: int) -> Boundary:
            return Boundary(number, self._membership, sender, self._recorder, settings, room.shared(len(numbers)))

        with ThreadPoolExecutor(len(numbers)) as pool:
            self._boundaries = dict(zip(numbers, pool.map(connect, numbers), strict=True))
        self._before, self._after = self._boundaries.get(stage - 1), self._boundaries.get(stage)
        self._averaging: GradientAverage | None = None
        self._step = Step(0, (), False)
        self._done: Counter[str] = Counter()
        self._play = engine._exec_schedule
        self._is_open = True
        self._take_over()
        threading._register_atexit(self._close_at_exit)  # type: ignore[attr-defined]  # atexit's are too late for threads

    def _take_over(self) -> None:
        """Put this object's instructions in place of the engine's own."""
        from deepspeed.runtime.pipe import schedule

        engine = self._engine
        engine._exec_schedule = self._exec_schedule
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
            schedule.SendActivation: self._send_activation,
            schedule.RecvActivation: self._recv_activation,
            schedule.SendGrad: self._send_grad,
            schedule.RecvGrad: self._recv_grad,
        }

    def average(self, averager: Averager) -> None:
        """Average weight gradients over the engine's data group by this."""
        self._averaging = GradientAverage(self._engine, averager)

    @property
    def sent_bytes(self) -> int:
        """Bytes of payloads that this process has sent, to other stages and to other replicas."""
        averaged = self._averaging.averager.sent_bytes if self._averaging is not None else 0
        return averaged + sum(one.sent_bytes for one in self._boundaries.values())

    # What the engine calls.

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        """Play a schedule of the engine's: a training step, or a validation, whose samples nobody remembers."""
        self._step = self._next_step(pipe_schedule)
        self._done.clear()
        self._recorder.begin_step()
        if self._averaging is not None:
            self._averaging.begin_step(self._step.number)
        for boundary in self._boundaries.values():
            if boundary.is_ready:
                boundary.begin(self._step)
        self._play(pipe_schedule)
        for boundary in self._boundaries.values():
            boundary.raise_if_failed()

    def _next_step(self, pipe_schedule: Any) -> Step:
        from deepspeed.runtime.pipe.schedule import TrainSchedule

        count, number = pipe_schedule.num_micro_batches, self._engine.global_steps
        if not isinstance(pipe_schedule, TrainSchedule):
            return Step(number, [Item(m, (), number) for m in range(count)], False)
        each = self._engine.train_micro_batch_size_per_gpu()
        ids, upcoming = self._ids(number, count * each), None
        if self._sample_ids is not None:
            upcoming = self._ids(number + 1, count * each)
        return Step(number, [Item(m, ids[m * each : (m + 1) * each], number) for m in range(count)], True, upcoming)

    def _ids(self, step: int, count: int) -> list[int]:
        """Return the ids of a step's samples; without a name their places will do, for what depends on them."""
        if self._sample_ids is None:
            return list(range(count))
        ids = [int(one) for one in self._sample_ids(step)]
        if len(ids) != count:
            raise RunError(
                f"sample_ids names {len(ids)} samples of step {step} (expected {count}: those of this replica's batch)"
            )
        return ids

    def _send_activation(self, engine: Any, buffer_id: int) -> None:
        outputs = engine.pipe_buffers["outputs"][buffer_id]
        assert self._after is not None
        if not isinstance(outputs, Tensor):
            raise RunError(f"{self._name} hands on {len(outputs)} tensors (expected one); compress can't send these")
        if not self._after.is_ready:
            engine._send_tensor_meta(outputs, engine.next_stage)
            self._make_ready(self._after, outputs.shape)
        self._after.put(outputs.detach(), self._step, self._place("send activation"))

    def _recv_activation(self, engine: Any, buffer_id: int) -> None:
        assert self._before is not None
        if not self._before.is_ready:
            described = engine._recv_tensor_meta(engine.prev_stage)
            engine._grad_layer_buf.clear()  # as large as an activation, and used by nobody now
            self._make_ready(self._before, described.shape)
        inputs = self._before.take(self._step, self._place("recv activation"))
        engine.pipe_buffers["inputs"][buffer_id] = inputs.requires_grad_()

    def _send_grad(self, engine: Any, buffer_id: int) -> None:
        assert self._before is not None
        grad = engine.pipe_buffers["inputs"][buffer_id].grad
        assert grad is not None
        self._before.put(grad, self._step, self._place("send grad"))
        engine.pipe_buffers["inputs"][buffer_id] = None

    def _recv_grad(self, engine: Any, buffer_id: int) -> None:
        assert self._after is not None
        engine.grad_layer = self._after.take(self._step, self._place("recv grad"))

    def _place(self, what: str) -> int:
        """Count an instruction: DeepSpeed's microbatches come in order, each way."""
        self._done[what] += 1
        return self._done[what] - 1

    @property
    def _name(self) -> str:
        return f"stage {self._membership.rank}"

    def _make_ready(self, boundary: Boundary, shape: torch.Size) -> None:
        """Make a boundary's codecs for tensors of this shape, a sample in each row, and begin the step there too."""
        each = self._engine.train_micro_batch_size_per_gpu()
        if boundary.remembers and self._step.is_training and shape[0] != each:
            raise RunError(
                f"activations have {shape[0]} rows for {each} samples; put samples first, or use a codec that doesn't"
                " remember them"
            )
        boundary.make_ready(shape[1:], self._engine.device, self._fail)
        boundary.begin(self._step)

    def _fail(self, error: WantrainError) -> None:
        """Let what waits on either neighbour hear of an error on the way to another."""
        for boundary in self._boundaries.values():
            boundary.fail(error)

    def close(self, timeout_s: float | None = None) -> None:
        """Part from the other processes, who do so too, and give the engine its own sends back.

        Raises ChannelError where one is late by `timeout_s` (default: that of `compress`), or gone.
        """
        self._close(self._timeout_s if timeout_s is None else timeout_s, is_orderly=True)

    def _close(self, patience_s: float, *, is_orderly: bool) -> None:
        if not self._is_open:
            return
        self._is_open = False
        del self._engine._exec_schedule, self._engine._INSTRUCTION_MAP
        if self._averaging is not None:
            self._averaging.close(patience_s)
        with ThreadPoolExecutor(len(self._boundaries)) as pool:
            closing = [pool.submit(one.close, patience_s, is_orderly=is_orderly) for one in self._boundaries.values()]
        for one in closing:
            one.result()
        self._membership.leave(patience_s)

    def _close_at_exit(self) -> None:
        """Let threads end while the interpreter still can; a process that is gone is no news by then."""
        with suppress(ChannelError):
            self._close(_AT_EXIT_S, is_orderly=False)


class SamplesInOrder:
    """Names the samples of an engine's `training_data`, which DeepSpeed deals to replicas in order, again and again."""

    def __init__(self, engine: Any, forward: str) -> None:
        if not engine.training_data:
            raise ConfigError(
                f"'{forward}' remembers samples by their ids; say which a step holds (sample_ids=), or give"
                " deepspeed.initialize the training_data"
            )
        if engine.curriculum_learning_enabled():
            raise ConfigError("curriculum learning draws samples anew; say which a step holds (sample_ids=)")
        self._engine, self._first_step = engine, engine.global_steps
        self._num_samples = len(engine.training_data)
        each, replicas = engine.train_micro_batch_size_per_gpu(), engine.grid.data_parallel_size
        self._per_epoch = -(-self._num_samples // replicas)  # the last are filled up from the first
        if engine.dataloader_drop_last():
            self._per_epoch -= self._per_epoch % each
        if self._per_epoch % each:
            raise ConfigError(
                f"an epoch's last microbatch would be short (a replica has {self._per_epoch} samples, microbatches of"
                f" {each}); set dataloader_drop_last"
            )

    def __call__(self, step: int) -> list[int]:
        engine = self._engine
        if (engine.is_first_stage() or engine.is_last_stage()) and engine.training_dataloader is None:
            raise RunError("train_batch was given other data than the engine's training_data; give compress sample_ids")
        replicas, replica = engine.grid.data_parallel_size, engine.grid.get_data_parallel_rank()
        count = engine.micro_batches * engine.train_micro_batch_size_per_gpu()
        first = (step - self._first_step) * count
        places = (place % self._per_epoch for place in range(first, first + count))
        return [(replica + place * replicas) % self._num_samples for place in places]


def _check_engine(engine: Any, forward: str, gradients: str | None) -> None:
    """Raise ConfigError for an engine whose sends can't go through codecs."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    problem = ""
    if not isinstance(engine, PipelineEngine):
        problem = f"compress takes a PipelineEngine (got {type(engine).__name__}); give deepspeed a PipelineModule"
    elif engine.num_stages < 2:
        problem = "a pipeline of one stage sends nothing; give PipelineModule more num_stages"
    elif "_INSTRUCTION_MAP" in vars(engine):
        problem = "this engine's sends were taken over before; close that first"
    elif engine.is_pipe_partitioned or engine.is_grad_partitioned:
        problem = "slices of activations can't be compressed; set pipe_partitioned and grad_partitioned to false"
    elif engine.dynamic_shape and parse_codec(forward).remembers:
        problem = f"'{forward}' can't remember samples of changing shape (dynamic_shape); use quantized or hadamard"
    elif gradients is not None and engine.zero_optimization():
        problem = "with ZeRO the optimizer reduces gradients itself; leave out gradients=, or set zero stage 0"
    if problem:
        raise ConfigError(problem)
