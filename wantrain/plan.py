"""The plan: who holds which layers, how many microbatches, in what order, and which codec each link uses.

It is a JSON file to be read, kept and edited. Everything that runs follows from it: ranks, schedules, channels. It
carries the prediction that was made for it, so that every run can be held against it.

Ranks are laid out replica by replica, stage by stage:

    replica 0:  rank 0 (stage 0) → rank 1 (stage 1)        pipeline_group = {0, 1}
    replica 1:  rank 2 (stage 0) → rank 3 (stage 1)        pipeline_group = {2, 3}
                data_group {0, 2}   data_group {1, 3}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from wantrain.codec_spec import check_activation_codec, check_gradient_codec
from wantrain.errors import ConfigError, PlanError
from wantrain.fact import Fact, read_json, write_text
from wantrain.schedule import Schedule, ScheduleKind, make_schedule
from wantrain.wire import Transport

VERSION = 1


def _checked(check: Callable[[str], str]) -> AfterValidator:
    def validate(name: str) -> str:
        try:
            return check(name)
        except ConfigError as caught:
            raise ValueError(str(caught)) from None

    return AfterValidator(validate)


ForwardCodec = Annotated[str, _checked(partial(check_activation_codec, is_forward=True))]
BackwardCodec = Annotated[str, _checked(partial(check_activation_codec, is_forward=False))]
GradientCodec = Annotated[str, _checked(check_gradient_codec)]
"""Names of codecs, see `wantrain.codec_spec`; one that can't do the work is refused."""

DEFAULT_BUCKET_BYTES = 4 * 2**20
"""Chosen: at 100 Mbit/s a bucket takes a third of a second, at 1 ms a thousandth of that goes to latency."""


class StagePlan(Fact):
    """Consecutive layers [first_layer, end_layer), how deep the stage runs ahead, and what it leaves for later."""

    first_layer: int = Field(ge=0)
    end_layer: int = Field(gt=0)
    max_in_flight: int = Field(ge=1)
    max_postponed: int = Field(default=0, ge=0)
    """Microbatches whose gradients of weights may wait, where the schedule splits the backward."""


class ReplicaPlan(Fact):
    """One copy of the pipeline: the worker of each stage, its share of each batch, the lanes it draws from."""

    workers: tuple[str, ...]
    num_microbatches: int = Field(ge=1)
    lanes: tuple[int, ...]


class BoundaryPlan(Fact):
    """What crosses from one stage to the next: codecs by direction, and the transport of each replica's link."""

    forward_codec: ForwardCodec = "raw:fp32"
    backward_codec: BackwardCodec = "raw:fp32"
    transports: tuple[Transport, ...]


class Prediction(Fact):
    """What the cost model expects of the plan."""

    step_s: float
    compute_s: float
    bubble_s: float
    exposed_communication_s: float
    memory_bytes: dict[str, int]
    bottleneck: str


class Plan(Fact):
    """The whole decision."""

    version: int = VERSION
    topology: str
    model: str
    num_layers: int
    batch_size: int = Field(ge=1)
    microbatch_size: int = Field(ge=1)
    num_lanes: int = Field(ge=1)
    schedule: ScheduleKind
    stages: tuple[StagePlan, ...] = Field(min_length=1)
    replicas: tuple[ReplicaPlan, ...] = Field(min_length=1)
    boundaries: tuple[BoundaryPlan, ...] = ()
    gradient_codec: GradientCodec = "raw:fp32"
    gradient_transport: Transport = Transport()
    bucket_bytes: int = Field(default=DEFAULT_BUCKET_BYTES, ge=1)
    max_codec_error: float | None = None
    """Relative error of a boundary's payloads above which more bits are used; None: as many as the codec says."""
    buffer_bytes: int = Field(default=0, ge=0)
    """What the message buffers of a worker may take of its memory, all together."""
    under_way_bytes: dict[str, int] = Field(default_factory=dict)
    """What a worker may have under way in all, where its links share a line: so what is ready first goes first."""
    prediction: Prediction | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in (self._version_problem(), self._stage_problem(), self._replica_problem(), self._batch_problem()):
            if problem:
                raise ValueError(problem)
        return self

    def _version_problem(self) -> str:
        return "" if self.version == VERSION else f"plan version {self.version} is not {VERSION}; make the plan anew"

    def _stage_problem(self) -> str:
        at = 0
        for i, stage in enumerate(self.stages):
            if stage.first_layer != at or stage.end_layer <= at:
                return f"stage {i} holds layers {stage.first_layer}–{stage.end_layer - 1} where layer {at} is next"
            at = stage.end_layer
        if at != self.num_layers:
            return f"the stages end at layer {at - 1} (the model has {self.num_layers} layers)"
        depths = [stage.max_in_flight for stage in self.stages]
        if depths != sorted(depths, reverse=True):
            return f"max_in_flight must not grow from stage to stage (got {depths})"
        if self.schedule in ("gpipe", "1f1b") and any(stage.max_postponed for stage in self.stages):
            return f"max_postponed is for schedules that split the backward, zero_bubble say (got {self.schedule})"
        if len(self.boundaries) != len(self.stages) - 1:
            return f"{len(self.stages)} stages have {len(self.stages) - 1} boundaries (got {len(self.boundaries)})"
        return ""

    def _replica_problem(self) -> str:
        names = self.workers
        for i, replica in enumerate(self.replicas):
            if len(replica.workers) != len(self.stages):
                return f"replica {i} has {len(replica.workers)} workers for {len(self.stages)} stages"
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            return f"worker '{min(twice)}' is named twice"
        if any(len(boundary.transports) != len(self.replicas) for boundary in self.boundaries):
            return f"a boundary's transports are one per replica ({len(self.replicas)})"
        return ""

    def _batch_problem(self) -> str:
        lanes = sorted(lane for replica in self.replicas for lane in replica.lanes)
        if lanes != list(range(self.num_lanes)):
            return f"the replicas' lanes must be 0–{self.num_lanes - 1}, each once (got {lanes})"
        per_lane, rest = divmod(self.batch_size, self.num_lanes)
        if rest:
            return f"a batch of {self.batch_size} can't be drawn evenly from {self.num_lanes} lanes"
        for i, replica in enumerate(self.replicas):
            samples = len(replica.lanes) * per_lane
            if samples != replica.num_microbatches * self.microbatch_size:
                return (
                    f"replica {i} draws {samples} samples a step, which {replica.num_microbatches} microbatches"
                    f" of {self.microbatch_size} don't hold"
                )
        return ""

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def workers(self) -> tuple[str, ...]:
        """Worker names in rank order."""
        return tuple(name for replica in self.replicas for name in replica.workers)

    @property
    def world_size(self) -> int:
        return len(self.stages) * len(self.replicas)

    def rank_of(self, worker: str) -> int:
        """Return a worker's rank; raise PlanError where the plan leaves it out."""
        if worker not in self.workers:
            raise PlanError(f"the plan has no worker '{worker}' (it has {', '.join(self.workers)}); check --worker")
        return self.workers.index(worker)

    def stage_of(self, rank: int) -> int:
        return rank % self.num_stages

    def replica_of(self, rank: int) -> int:
        return rank // self.num_stages

    def rank_at(self, replica: int, stage: int) -> int:
        return replica * self.num_stages + stage

    def data_group(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that hold the same stage, in replica order."""
        return tuple(self.rank_at(replica, stage) for replica in range(len(self.replicas)))

    @property
    def codecs(self) -> frozenset[str]:
        """The names of all codecs in use."""
        ways = {codec for one in self.boundaries for codec in (one.forward_codec, one.backward_codec)}
        return frozenset(ways | ({self.gradient_codec} if len(self.replicas) > 1 else set()))

    def actions(self, replica: int) -> Schedule:
        """Return the ordered actions of each stage of one replica."""
        depths = [stage.max_in_flight for stage in self.stages]
        postponed = [stage.max_postponed for stage in self.stages]
        count = self.replicas[replica].num_microbatches
        return make_schedule(self.schedule, self.num_stages, count, depths, postponed)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan; raise PlanError, one line, for anything that is not one."""
        return cls.parse(read_json(path, PlanError), PlanError, str(path))
