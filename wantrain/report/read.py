"""Gather what a run directory holds, as far as the run has come, and add it up.

Nothing here is required but the directory itself: a run that is still going has no summary, one without emulation no
network record, one that has just begun no timeline. What is missing is None or empty, and the page says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from wantrain.errors import ConfigError
from wantrain.fact import read_json
from wantrain.plan import Plan
from wantrain.run_directory import CodecLoss, NetworkRecord, RunDirectory, StepRecord, ValidationRecord
from wantrain.timeline import Timeline
from wantrain.topology import Topology

Record = TypeVar("Record", StepRecord, ValidationRecord)

PAUSE_S = 60.0
"""Chosen: a gap between two steps longer than this and ten steps is a run that stood still, not a slow step."""


class LinkUse(NamedTuple):
    """What crossed one directed pair in an average step; `busy_share` is of the step's time."""

    source: str
    target: str
    raw_bytes: float
    wire_bytes: float
    busy_share: float
    sending_bytes_per_s: float


class CodecLine(NamedTuple):
    """What a lossy codec lost on the way from one worker to another, step by step."""

    source: str
    target: str
    steps: tuple[int, ...]
    losses: tuple[CodecLoss, ...]


class RankTime(NamedTuple):
    """Where one rank's average step went."""

    worker: str
    step_s: float
    compute_s: float
    waited_s: dict[str, float]

    @property
    def other_s(self) -> float:
        """Seconds that were neither computing nor waiting for somebody: optimizer, agreement, gradients under way."""
        return max(0.0, self.step_s - self.compute_s - sum(self.waited_s.values()))


@dataclass(frozen=True)
class RunData:
    """All that is known of a run; `steps` is one tuple of records per rank, each step once."""

    name: str
    workers: tuple[str, ...]
    steps: tuple[tuple[StepRecord, ...], ...]
    validations: tuple[ValidationRecord, ...]
    summary: dict[str, Any]
    config: dict[str, Any] | None = None
    plan: Plan | None = None
    topology: Topology | None = None
    network: NetworkRecord | None = None
    predicted: Timeline | None = None
    measured: Timeline | None = None

    @property
    def num_done(self) -> int:
        """Steps done since the beginning, those before the run was resumed among them (records count from 0)."""
        return self.steps[0][-1].step + 1 if self.steps and self.steps[0] else self.summary.get("steps", 0)

    @property
    def num_planned(self) -> int | None:
        """Steps that the run file asks for, where it says so."""
        training = (self.config or {}).get("training")
        planned = training.get("steps") if isinstance(training, dict) else None
        return planned if isinstance(planned, int) else None

    @property
    def median_step_s(self) -> float | None:
        """The median step's seconds as rank 0 measured them."""
        seconds = sorted(record.step_s for record in self.steps[0]) if self.steps else []
        return seconds[len(seconds) // 2] if seconds else None


def read_run(run: RunDirectory) -> RunData:
    """Read everything that is there; raise ConfigError where there is no run directory."""
    if not run.path.is_dir():
        raise ConfigError(f"no run directory at {run.path}; give the folder that `wantrain launch` or `train` wrote")
    plan = Plan.load(run.plan) if run.plan.exists() else None
    workers = plan.workers if plan else tuple(f"rank {rank}" for rank in range(_num_ranks(run)))
    steps = tuple(tuple(_once(run.read_steps(rank))) for rank in range(len(workers)))
    if plan is None and not any(steps) and not run.config.exists():
        raise ConfigError(f"{run.path} is not a run directory (no plan, metrics or config in it); check the path")
    return RunData(
        name=run.path.resolve().name,
        workers=workers,
        steps=steps,
        validations=tuple(_once(run.read_validations())),
        summary=read_json(run.summary, ConfigError) if run.summary.exists() else {},
        config=read_json(run.config, ConfigError) if run.config.exists() else None,
        plan=plan,
        topology=Topology.load(run.topology) if run.topology.exists() else None,
        network=_read_network(run.network) if run.network.exists() else None,
        predicted=Timeline.load(run.predicted) if run.predicted.exists() else None,
        measured=typical(run.read_timelines(workers)),
    )


def _num_ranks(run: RunDirectory) -> int:
    rank = 0
    while run.metrics(rank).exists():
        rank += 1
    return rank


def _read_network(path: Path) -> NetworkRecord:
    return NetworkRecord.parse(read_json(path, ConfigError), ConfigError, str(path))


def _once(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of each step, in step order: a resumed run may have done some steps twice."""
    by_step = {record.step: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def typical(timelines: Sequence[Timeline]) -> Timeline | None:
    """Return the recorded step of median length, so that neither the warm-up nor a hiccup stands for the run."""
    ordered = sorted(timelines, key=lambda timeline: timeline.span_s)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def elapsed_s(records: Sequence[StepRecord]) -> tuple[list[float], list[float]]:
    """Return the wall clock at each step's end since training began, and the times at which a pause was cut out."""
    elapsed: list[float] = []
    resumed: list[float] = []
    for i, record in enumerate(records):
        gap_s = record.finished_at - records[i - 1].finished_at if i else record.step_s
        if gap_s < 0 or gap_s > PAUSE_S + 10 * record.step_s:
            resumed.append(elapsed[-1] if elapsed else 0.0)
            gap_s = record.step_s
        elapsed.append((elapsed[-1] if elapsed else 0.0) + gap_s)
    return elapsed, resumed


def link_uses(data: RunData) -> list[LinkUse]:
    """Add up each directed pair's traffic over all steps, busiest first."""
    uses = [use for worker, records in zip(data.workers, data.steps, strict=True) for use in _uses_of(worker, records)]
    return sorted(uses, key=lambda use: -use.busy_share)


def _uses_of(worker: str, records: Sequence[StepRecord]) -> list[LinkUse]:
    raw: dict[str, int] = defaultdict(int)
    wire: dict[str, int] = defaultdict(int)
    busy_s: dict[str, float] = defaultdict(float)
    for record in records:
        for peer, traffic in record.sent.items():
            raw[peer] += traffic.raw_bytes
            wire[peer] += traffic.wire_bytes
            busy_s[peer] += traffic.busy_s
    total_s = sum(record.step_s for record in records)
    return [
        LinkUse(
            worker,
            peer,
            raw[peer] / len(records),
            wire[peer] / len(records),
            busy_s[peer] / total_s if total_s else 0.0,
            wire[peer] / busy_s[peer] if busy_s[peer] else 0.0,
        )
        for peer in wire
    ]


def rank_times(data: RunData) -> list[RankTime]:
    """Return where each rank's average step went; a rank without steps yet is left out."""
    return [_time_of(worker, records) for worker, records in zip(data.workers, data.steps, strict=True) if records]


def _time_of(worker: str, records: Sequence[StepRecord]) -> RankTime:
    waited: dict[str, float] = defaultdict(float)
    for record in records:
        for peer, seconds in record.waited_s.items():
            waited[peer] += seconds / len(records)
    num_steps = len(records)
    step_s = sum(record.step_s for record in records) / num_steps
    return RankTime(worker, step_s, sum(record.compute_s for record in records) / num_steps, dict(waited))


def codec_losses(data: RunData) -> list[CodecLine]:
    """Return what was lost on each boundary and way, in rank order."""
    lines = []
    for worker, records in zip(data.workers, data.steps, strict=True):
        for name in dict.fromkeys(name for record in records for name in record.codecs):
            measured = [(record.step, record.codecs[name]) for record in records if name in record.codecs]
            steps, losses = zip(*measured, strict=True)
            lines.append(CodecLine(worker, name.partition("/")[0], steps, losses))
    return lines
