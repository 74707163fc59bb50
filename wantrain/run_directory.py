"""The run directory: what a job leaves behind, and where.

config.json          the run file as resolved, every default spelled out
plan.json            the plan, with its prediction
plan-until-step-00000040.json  the plan until then, where a launch made another without lost workers
topology.toml        the topology that it was made for
predicted.json       the simulator's timeline of one step
network.json         the network asked and measured (emulated runs)
metrics/rank-0.jsonl one line per step and rank (StepRecord), and one per validation (ValidationRecord)
timelines/rank-0.jsonl  events of some steps, one line per recorded step
logs/NAME.log        what each worker printed
checkpoints/step-00000100/
notes.txt            what the run has to tell: resumed from where, what was passed over
stop                 made by whoever wants the run to end after the step at hand
summary.json         final figures (written by rank 0 at the end)
report.html
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from wantrain.errors import ConfigError
from wantrain.fact import Fact
from wantrain.timeline import Event, Timeline, merge


class LinkTraffic(Fact):
    """What a rank sent to one peer in a step; `busy_s` is measured, and at least what the link's rate needs."""

    raw_bytes: int
    wire_bytes: int
    busy_s: float


class CodecLoss(Fact):
    """What a lossy codec lost in one microbatch of a step: error by the norm of what was sent, share of clipped."""

    relative_error: float
    clipped_share: float
    bits: int


class StepRecord(Fact):
    """One rank's line for one step. `loss` is the batch's mean, the same on every rank.

    `codecs` is what was lost, by "PEER/WAY", on the boundaries to which this rank sends with a lossy codec.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_s: float
    compute_s: float
    waited_s: dict[str, float]
    sent: dict[str, LinkTraffic]
    finished_at: float
    codecs: dict[str, CodecLoss] = Field(default_factory=dict)


class ValidationRecord(Fact):
    """The held-out loss after a step, in nats per token."""

    step: int
    validation_loss: float


class LinkMeasurement(Fact):
    """One ordered pair: the payload rate and one-way latency that were asked, and what was measured."""

    source: str
    target: str
    asked_bytes_per_s: float
    measured_bytes_per_s: float
    asked_latency_s: float
    measured_latency_s: float


class NetworkRecord(Fact):
    """The emulated network of a run; all figures undilated."""

    delay_by: str
    dilation: float
    links: tuple[LinkMeasurement, ...]


class RunDirectory:
    """Paths and readers of a run directory; nothing is created before it is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def topology(self) -> Path:
        return self.path / "topology.toml"

    @property
    def predicted(self) -> Path:
        return self.path / "predicted.json"

    @property
    def network(self) -> Path:
        return self.path / "network.json"

    @property
    def notes(self) -> Path:
        """What the run has to tell the user, a line each: resumed from where, stopped why."""
        return self.path / "notes.txt"

    @property
    def stop(self) -> Path:
        """While this file exists, the run ends after the step at hand."""
        return self.path / "stop"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def saved_steps(self) -> list[int]:
        """Return the steps of finished checkpoints, newest first."""
        return saved_steps(self.checkpoints)

    @property
    def buffers(self) -> Path:
        """Where message buffers keep what has no room in memory."""
        return self.path / "buffers"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def metrics(self, rank: int) -> Path:
        return self.path / "metrics" / f"rank-{rank}.jsonl"

    def timelines(self, rank: int) -> Path:
        return self.path / "timelines" / f"rank-{rank}.jsonl"

    def read_steps(self, rank: int) -> list[StepRecord]:
        """Return one rank's steps so far."""
        return [StepRecord.model_validate(line) for line in read_lines(self.metrics(rank)) if "loss" in line]

    def read_validations(self) -> list[ValidationRecord]:
        """Return the held-out losses so far, as rank 0 wrote them."""
        lines = read_lines(self.metrics(0))
        return [ValidationRecord.model_validate(line) for line in lines if "validation_loss" in line]

    def read_timelines(self, workers: tuple[str, ...]) -> list[Timeline]:
        """Join the ranks' recorded steps on the wall clock, as far as every rank has them."""
        by_step: dict[int, dict[int, dict[str, Any]]] = {}
        for rank in range(len(workers)):
            for line in read_lines(self.timelines(rank)):
                by_step.setdefault(line["step"], {})[rank] = line
        complete = {step: lines for step, lines in sorted(by_step.items()) if len(lines) == len(workers)}
        return [merge("measured", workers, step, _on_one_clock(lines)) for step, lines in complete.items()]


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the finished checkpoints in a folder, newest first."""
    found = [entry.name.removeprefix("step-") for entry in checkpoints.glob("step-*") if entry.is_dir()]
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def _on_one_clock(lines: dict[int, dict[str, Any]]) -> Iterator[Event]:
    first_s = min(line["began_at"] for line in lines.values())
    for line in lines.values():
        shift_s = (line["began_at"] - first_s) / line["dilation"]
        for row in line["events"]:
            event = Event(*row)
            yield event._replace(start_s=event.start_s + shift_s, end_s=event.end_s + shift_s)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, without a last line that is still being written; a missing file has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as caught:
        raise ConfigError(f"{path} is damaged ({caught}); remove the line") from None
