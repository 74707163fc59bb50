"""What a run tells whoever watches it: one interface for all, and the run directory's own lines as its first form.

Every rank has sinks of its own and tells them what it alone knows: what it computed, whom it waited for, what it sent.
The job's figures (loss, gradient norm, speed) are the same on every rank; outside sinks show rank 0's only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wantrain.fact import append_line, write_text
from wantrain.pipeline.recorder import Recorder
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory, StepRecord, ValidationRecord, read_lines


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step; `first_step` is where a resumed one goes on.

    `folder` is the run directory, where there is one; `address` is how others reach this host, where that is known.
    """

    name: str
    rank: int
    plan: Plan
    first_step: int = 0
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None

    @property
    def worker(self) -> str:
        """This rank's worker."""
        return self.plan.workers[self.rank]

    @property
    def is_first(self) -> bool:
        """Whether this rank tells the job's figures."""
        return self.rank == 0


class MetricsSink(Protocol):
    """Where a rank's figures go. Nothing but `begin` may raise: what else fails is said once, and training goes on."""

    def begin(self, facts: RunFacts) -> None:
        """Get ready, before the first step; raise ConfigError where what was asked for can't be had."""

    def step(self, record: StepRecord) -> None:
        """Take down a step, once it is done."""

    def validation(self, record: ValidationRecord) -> None:
        """Take down a held-out loss."""

    def note(self, text: str) -> None:
        """Take down what the run has to tell its user, one line."""

    def close(self) -> None:
        """Bring everything to its place; nothing comes after."""


class RunLines:
    """One rank's metrics and timelines in a run directory, a JSON line each; `wantrain top` and `report` read them."""

    def __init__(self, folder: str | Path) -> None:
        self._run = RunDirectory(folder)
        self._metrics = self._timelines = Path()

    def begin(self, facts: RunFacts) -> None:
        """Drop what a resumed run does again; leave the plan where nobody has yet, so that readers know who is who."""
        self._metrics, self._timelines = self._run.metrics(facts.rank), self._run.timelines(facts.rank)
        if facts.is_first and not self._run.plan.exists():
            facts.plan.save(self._run.plan)
        for path in (self._metrics, self._timelines):
            kept = [line for line in read_lines(path) if line["step"] < facts.first_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, record: StepRecord) -> None:
        """Add a line."""
        append_line(self._metrics, record.model_dump_json())

    def validation(self, record: ValidationRecord) -> None:
        """Add a line."""
        append_line(self._metrics, record.model_dump_json())

    def note(self, text: str) -> None:
        """Add a line to the run's notes, where a launcher looks for it."""
        append_line(self._run.notes, text)

    def timeline(self, step: int, recorder: Recorder) -> None:
        """Add the events of a step, with the wall clock of its begin."""
        events = [[round(v, 6) if isinstance(v, float) else v for v in event] for event in recorder.events()]
        line: dict[str, Any] = {
            "step": step,
            "began_at": recorder.wall_clock_s,
            "dilation": recorder.dilation,
            "events": events,
        }
        append_line(self._timelines, json.dumps(line))

    def close(self) -> None:
        """Every line is already in its place."""


def job_figures(record: StepRecord) -> dict[str, float]:
    """Return what a step says of the whole job, by the names under which dashboards show it."""
    return {
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "tokens_per_s": record.tokens / record.step_s if record.step_s else 0.0,
    }


def own_figures(record: StepRecord) -> dict[str, float]:
    """Return what a step says of the rank itself: its time, its waiting by peer, its links and their codecs."""
    figures = {"worker/step_s": record.step_s, "worker/compute_s": record.compute_s}
    figures |= {f"waited_s/{peer}": seconds for peer, seconds in record.waited_s.items()}
    for peer, sent in record.sent.items():
        figures[f"sent_bytes/{peer}"] = sent.wire_bytes
        figures[f"uncompressed_bytes/{peer}"] = sent.raw_bytes
        figures[f"link_busy_share/{peer}"] = sent.busy_s / record.step_s if record.step_s else 0.0
    for way, lost in record.codecs.items():
        figures[f"codec_error/{way}"] = lost.relative_error
        figures[f"codec_bits/{way}"] = lost.bits
    return figures


def announce(run_directory: RunDirectory, rank: int, text: str) -> None:
    """Tell the user, once: on rank 0's standard error, and in the run directory, where a launcher looks for it."""
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
        append_line(run_directory.notes, text)
