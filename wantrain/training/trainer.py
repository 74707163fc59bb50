"""One rank's part in training: play the step, agree on the norm, update.

What the ranks tell each other at the end of a step is one small vector, sent straight from each to all, so that it
costs one latency: whether somebody asked to stop, the loss, and the squared gradient norm of every parameter. Norms
are added in layer order, replica 0's, so that clipping gives the same bits under every plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from wantrain.codecs.codec import prepare_codecs
from wantrain.comm.groups import Membership, join
from wantrain.errors import PlanError, RunError
from wantrain.pipeline.boundary_codecs import DEFAULT_SETTINGS, CodecSettings
from wantrain.pipeline.connect import Connections
from wantrain.pipeline.executor import Executor, Microbatch
from wantrain.pipeline.gradients import GradientBuckets, alignment_of
from wantrain.pipeline.recorder import Recorder
from wantrain.pipeline.stage import DilatedStage, LossFunction, Stage, TorchStage, slowed
from wantrain.plan import Plan
from wantrain.run_directory import LinkTraffic, StepRecord
from wantrain.schedule import splits_backward
from wantrain.timeline import COMPUTE_KINDS
from wantrain.training.metrics import MetricsSink, RunFacts
from wantrain.training.quantized_adam import QuantizedAdam
from wantrain.training.watch import Watch

_NUM_AGREED = 2
"""What ranks tell each other beside gradient norms: whether to stop, and their part of the loss."""

LayerFactory = Callable[[int, int], Sequence[nn.Module]]
Layers = Sequence[nn.Module] | nn.Sequential | nn.ModuleList | LayerFactory
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Batch(NamedTuple):
    """One replica's samples of a step, lane by lane: ids, `inputs` and `targets` int64 [samples, seq]."""

    sample_ids: Sequence[int]
    inputs: Tensor
    targets: Tensor


class StepResult(NamedTuple):
    """What a step gave, the same on every rank: mean loss of the batch, gradient norm before clipping."""

    loss: float
    grad_norm: float
    stop_requested: bool


class Trainer:
    """Trains one stage of a plan's model; every rank has one and calls the same methods in the same order."""

    def __init__(
        self,
        layers: Layers,
        plan: Plan,
        *,
        loss: LossFunction,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        worker: str,
        clip_norm: float | None = 1.0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        recompute: bool = False,
        tied: Callable[[Sequence[nn.Module]], Sequence[nn.Parameter]] = lambda _: (),
        before_forward: Callable[[Sequence[nn.Module], int, Sequence[int]], None] = lambda *_: None,
        device: torch.device | str = "cpu",
        address: str | None = None,
        timeout_s: float = 120.0,
        dilation: float = 1.0,
        layers_are_dilated: bool = False,
        membership: Membership | None = None,
        codec_settings: CodecSettings = DEFAULT_SETTINGS,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        """Join the job that torchrun started as the plan's `worker` and connect to the neighbours.

        `layers` is the whole model as a list (or nn.Sequential, nn.ModuleList), of which the rank keeps its own, or a
        function of (first, end) that builds only those. With `recompute` layers keep only their inputs (activation
        checkpointing); the plan is then made from `profile.with_recomputing()`. Parameters that need no gradient stay
        as they are. `tied` names, among a rank's layers, a parameter that the first and the last stage share;
        `before_forward` is given the layers, the step and the samples of the next forward (dropout needs them).
        On a network slowed by `dilation` layers and optimizer are slowed too, unless they are already
        (`layers_are_dilated`).
        `address` is this host's, as the others reach it (default: the one that leads to MASTER_ADDR).
        `sinks` are told of every step (`training/metrics.py`); `trainer.watch` tells them of validations too.
        Raises PlanError where plan and job don't fit, ChannelError where a peer doesn't come.
        """
        self.plan, self.clip_norm, self.timeout_s, self._device = plan, clip_norm, timeout_s, device
        if torch.device(device).type == "cpu":
            prepare_codecs(plan.codecs)
        self.membership = membership or join(plan.world_size, plan.rank_of(worker), timeout_s, plan.workers, address)
        self.rank = self.membership.rank
        self.stage_index, self.replica = plan.stage_of(self.rank), plan.replica_of(self.rank)
        span = plan.stages[self.stage_index]
        own = _own_layers(layers, span.first_layer, span.end_layer)
        self.layers = dict(zip(range(span.first_layer, span.end_layer), own, strict=True))
        self.recorder = Recorder(self.rank, dilation)
        self.connections = Connections.open(
            plan,
            self.membership,
            self.recorder,
            timeout_s,
            is_tied=bool(tied(own)),
            device=device,
            settings=codec_settings,
        )
        self._modules = nn.ModuleList(own).to(device)
        self.parameters = [parameter for parameter in self._modules.parameters() if parameter.requires_grad]
        self.stop_requested = False
        self.step_number = 0
        self.step_s = 0.0
        self._num_norms = max(
            int(count) for (count,) in self.membership.all_exchange([len(self.parameters)], timeout_s)
        )
        self._result = StepResult(math.nan, math.nan, False)
        self._sharing: QuantizedAdam | None = None
        self._before_forward = before_forward
        self._set_up_gradients(tied(own))
        self.optimizer = optimizer(self.parameters or [nn.Parameter(torch.zeros(1))])  # torch's refuse to have nothing
        ends = {0, plan.num_layers - 1}
        self._recomputed = {i - span.first_layer for i in self.layers if i not in ends} if recompute else set()
        self._actions = plan.actions(self.replica)[self.stage_index]
        self._stage = TorchStage(
            own, loss=loss, loss_scale=plan.microbatch_size / plan.batch_size, autocast=autocast,
            recomputed=self._recomputed, is_split=splits_backward(self._actions),
        )  # fmt: skip
        is_slowed = dilation != 1 and not layers_are_dilated
        self._slowed = partial(slowed, dilation if is_slowed else 1.0, torch.device(device).type == "cuda")
        self._executor = self._make_executor(DilatedStage(self._stage, dilation) if is_slowed else self._stage)
        self.watch = Watch(RunFacts(plan.model, self.rank, plan, address=address), sinks)

    def _set_up_gradients(self, tied: Sequence[nn.Parameter]) -> None:
        """Lay out the buckets; a parameter that both ends of the pipeline hold gets one of its own."""
        self._shared = tied[0] if tied and self.plan.num_stages > 1 else None
        own = [parameter for parameter in self.parameters if parameter is not self._shared]
        alignment, size = alignment_of(self.plan.gradient_codec), self.plan.bucket_bytes
        data, ends = self.connections.data_reducer, self.connections.tied_reducer
        self._reducers = [reducer for reducer in (data, ends) if reducer is not None]
        self.buckets = [GradientBuckets(own, size, *self._reducers[: data is not None], alignment=alignment)]
        if self._shared is not None:
            self.buckets.append(GradientBuckets([self._shared], size, *self._reducers, alignment=alignment))

    def _begin_gradients(self) -> None:
        """Start a step's gradients from zero. After its warm-up QuantizedAdam has momenta summed in their place."""
        adam = self.optimizer if isinstance(self.optimizer, QuantizedAdam) else None
        is_plain = adam is not None and adam.is_warming_up
        self._sharing = None if is_plain else adam
        for reducer in self._reducers:
            reducer.begin_step(self.step_number)
        for buckets in self.buckets:
            buckets.zero(self._sharing.make_share if self._sharing is not None else None, is_plain)

    def _make_executor(self, stage: Stage) -> Executor:
        def prepare(samples: Sequence[int]) -> None:
            self._before_forward(list(self._modules), self.step_number, samples)

        return Executor(
            self._actions,
            stage,
            self.recorder,
            upstream=self.connections.upstream,
            downstream=self.connections.downstream,
            before_forward=prepare,
            before_backward=prepare if self._recomputed else lambda _: None,
            before_final=self._arm,
            reduce=self._reduce,
            step=self._agree_and_update,
        )

    @property
    def is_last_stage(self) -> bool:
        return self.stage_index == self.plan.num_stages - 1

    def step(self, batch: Batch, upcoming: Sequence[int] | None = None) -> StepResult:
        """Train on one batch; `batch` holds this replica's samples (the other replicas hold the rest).

        `upcoming` are the ids of this replica's next batch, in order. Codecs that remember samples then agree on them
        while this step runs; without it they do at the beginning of the next, which costs a round trip.
        """
        self.recorder.begin_step()
        self.connections.begin_step()
        self._begin_gradients()
        self.membership.expect_exchange(_NUM_AGREED + self._num_norms)
        self._executor.play(self._microbatches(batch), self.step_number, upcoming)
        self.step_number += 1
        self.step_s = self.recorder.elapsed_s
        if self.watch.is_asked:
            self.watch.step(self.record(self.plan.batch_size * batch.inputs[0].numel()))
        return self._result

    def record(self, tokens: int) -> StepRecord:
        """Return what the step that has just ended was like; `tokens` is what the whole job trained on in it."""
        return StepRecord(
            step=self.step_number - 1,
            loss=self._result.loss,
            grad_norm=self._result.grad_norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            tokens=tokens,
            step_s=self.step_s,
            compute_s=self.recorder.seconds(*COMPUTE_KINDS),
            waited_s=self.recorder.waited_s(),
            sent=self.traffic(),
            finished_at=time.time(),
            codecs=self.connections.codecs.losses(),
        )

    def evaluate(self, batch: Batch) -> float:
        """Return the mean loss of samples that this replica's ranks all hold, without training on them."""
        self._modules.eval()
        losses = self._executor.evaluate(self._microbatches(batch), self.step_number)
        self._modules.train()
        mine = [math.fsum(losses), float(len(losses))]
        shares = self.membership.all_exchange(mine, self.timeout_s, "the validation loss")
        total, count = (math.fsum(column) for column in zip(*shares, strict=True))
        return total / count

    def close(self) -> None:
        """Close the sinks, and leave the job by agreement with all other ranks."""
        self.watch.close()
        self.connections.close(self.timeout_s)
        self.membership.leave(self.timeout_s)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in order; values are plain data, small, and rarely gathered."""
        return self.membership.gather(value, self.timeout_s)

    def agree(self, values: Mapping[str, str]) -> None:
        """Raise PlanError where one of another rank's values, by what they are, differs from this one's."""
        own = {what: xxhash.xxh3_64_hexdigest(value.encode()) for what, value in values.items()}
        for rank, other in enumerate(self.gather(own)):
            for what, digest in own.items():
                if other[what] != digest:
                    raise PlanError(
                        f"{what} of worker '{self.plan.workers[rank]}' differs from this worker's; use the same"
                    )

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def traffic(self) -> dict[str, LinkTraffic]:
        """Return what this rank sent in the running step, by peer."""
        return self.connections.traffic()

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        size = self.plan.microbatch_size
        starts = range(0, len(batch.sample_ids), size)
        return [
            Microbatch(
                batch.sample_ids[at : at + size],
                inputs=batch.inputs[at : at + size].to(self._device) if self.stage_index == 0 else None,
                targets=batch.targets[at : at + size].to(self._device) if self.is_last_stage else None,
            )
            for at in starts
        ]

    def _arm(self) -> None:
        owed = self._stage.owed()
        for buckets in self.buckets:
            buckets.arm(owed)

    def _reduce(self) -> None:
        """Wait until every gradient is the sum over the replicas, a shared one over both ends too."""
        start_s = time.monotonic()
        for buckets in self.buckets:
            buckets.finish(self.timeout_s)
        if self._sharing is not None:
            self._sharing.take_sum(self.parameters)
        self.recorder.add("reduce", start_s, time.monotonic())

    def _agree_and_update(self) -> None:
        start_s = time.monotonic()
        self.connections.raise_if_failed()
        with self._slowed():
            norms = self._squared_norms()
        norms += [0.0] * (self._num_norms - len(norms))
        mine = [float(self.stop_requested), self._executor.loss, *norms]
        shares = self.membership.all_exchange(mine, self.timeout_s, f"the gradient norms of step {self.step_number}")
        loss = sum(share[1] for share in shares)
        pipeline = shares[: self.plan.num_stages]  # replica 0's, in stage order; the other replicas hold the same
        grad_norm = math.sqrt(sum(square for share in pipeline for square in share[2:]))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunError(
                f"step {self.step_number} diverged (loss {loss:g}, gradient norm {grad_norm:g});"
                " lower the learning rate and go on from the last checkpoint"
            )
        with self._slowed():
            self._clip(grad_norm)
            self.optimizer.step()
        self._result = StepResult(loss, grad_norm, any(share[0] for share in shares))
        self.recorder.add("step", start_s, time.monotonic())

    def _squared_norms(self) -> list[float]:
        """Return each parameter's squared gradient norm, in layer order; a shared one counts on stage 0 only."""
        counted = [p for p in self.parameters if p is not self._shared or self.stage_index == 0]
        return [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64).item() ** 2 for p in counted if p.grad is not None
        ]

    def _clip(self, grad_norm: float) -> None:
        if self.clip_norm is None or grad_norm <= self.clip_norm:
            return
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(self.clip_norm / grad_norm)


def _own_layers(layers: Layers, first: int, end: int) -> list[nn.Module]:
    """Return a rank's layers; an nn.Sequential is the list of its modules, though it can be called."""
    if isinstance(layers, nn.Sequential | nn.ModuleList) or not callable(layers):
        if len(layers) < end:
            raise PlanError(f"the plan has {end} layers or more (the model has {len(layers)}); plan for this model")
        return list(layers)[first:end]
    return list(layers(first, end))
