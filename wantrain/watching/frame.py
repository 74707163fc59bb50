"""What `wantrain top` shows: how a run stands at one moment, from what its workers write anyway.

Nothing is asked of the workers, so looking costs the job nothing, and a run that has ended looks as it did at its end.
Only what was added since the last look is read. Shares are of a worker's own step time, over the last steps.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from wantrain.errors import ConfigError
from wantrain.fact import read_json
from wantrain.launch.progress import WINDOW
from wantrain.launch.tail import Tail
from wantrain.plan import Plan
from wantrain.report.read import LinkUse, RankTime, RunData, link_uses, rank_times
from wantrain.run_directory import RunDirectory, StepRecord

State = Literal["starting", "running", "silent", "stopped", "finished"]

_NUM_NOTES = 3
_SILENT_AFTER_S = 60.0
"""Chosen: no step for this long, and for ten steps' time, is worth a word."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker: where it stands in the plan, its last step, and where its average step went."""

    worker: str
    stage: int
    replica: int
    step: int
    step_s: float
    computing: float
    waiting: dict[str, float]
    """Share of the step by whom was waited for, longest first."""


@dataclass(frozen=True)
class Frame:
    """How a run stands; `steps_done` counts those before it was resumed too, `num_steps` is None where nobody said."""

    name: str
    model: str
    state: State
    steps_done: int
    num_steps: int | None
    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    step_s: float | None
    left_s: float | None
    age_s: float | None
    """Seconds since the last step ended."""
    losses: tuple[float, ...]
    workers: tuple[WorkerRow, ...]
    links: tuple[LinkUse, ...]
    notes: tuple[str, ...]

    @property
    def longest_wait(self) -> tuple[str, str, float] | None:
        """Who waits longest for whom, and for which share of its step."""
        waits = [(row.worker, peer, share) for row in self.workers for peer, share in row.waiting.items()]
        return max(waits, key=lambda wait: wait[2], default=None)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("stopped", "finished")


class RunWatcher:
    """Looks at a run directory again and again."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.time) -> None:
        """Find out who takes part; raise ConfigError where there is no run."""
        if not run.plan.exists():
            raise ConfigError(f"no run in {run.path}; give the folder that `wantrain launch` or `train` writes")
        self._run, self._clock = run, clock
        self._plan = Plan.load(run.plan)
        self._tails = [Tail(run.metrics(rank)) for rank in range(self._plan.world_size)]
        self._recent: list[deque[StepRecord]] = [deque(maxlen=WINDOW) for _ in self._tails]
        self._losses: list[list[float]] = [[] for _ in self._tails]
        self._held_out: float | None = None

    def look(self) -> Frame:
        """Read what is new, and return how the run stands."""
        for rank, tail in enumerate(self._tails):
            lines = tail.read()
            if tail.restarted:
                self._forget(rank)
            for i, line in enumerate(lines):
                self._take(rank, line, is_recent=i >= len(lines) - 2 * WINDOW)
        return self._frame()

    def _forget(self, rank: int) -> None:
        self._recent[rank].clear()
        self._losses[rank].clear()

    def _take(self, rank: int, line: dict[str, Any], is_recent: bool) -> None:
        """Keep a line's loss, and all of it where it may matter to the last steps' figures."""
        if "validation_loss" in line:
            self._held_out = line["validation_loss"]
            return
        self._losses[rank].append(line["loss"])
        if is_recent:
            self._recent[rank].append(StepRecord.model_validate(line))

    @property
    def _lead(self) -> int:
        """The lowest rank whose lines are on this disk: every rank has the job's loss and speed."""
        return next((rank for rank, recent in enumerate(self._recent) if recent), 0)

    def _frame(self) -> Frame:
        plan, records = self._plan, self._recent[self._lead]
        config = read_json(self._run.config, ConfigError) if self._run.config.exists() else {}
        num_steps = config.get("training", {}).get("steps")
        step_s = sum(record.step_s for record in records) / len(records) if records else None
        steps_done = records[-1].step + 1 if records else 0
        data = RunData("", plan.workers, tuple(tuple(recent) for recent in self._recent), (), {})
        return Frame(
            name=self._run.path.resolve().name,
            model=f"{plan.model}, {plan.num_stages} × {len(plan.replicas)} on {plan.topology}",
            state=self._state(steps_done),
            steps_done=steps_done,
            num_steps=num_steps,
            loss=records[-1].loss if records else None,
            validation_loss=self._held_out,
            tokens_per_s=sum(record.tokens for record in records) / (step_s * len(records)) if step_s else None,
            step_s=step_s,
            left_s=self._left_s(num_steps, steps_done),
            age_s=self._clock() - records[-1].finished_at if records else None,
            losses=tuple(self._losses[self._lead]),
            workers=tuple(self._row(time) for time in rank_times(data)),
            links=tuple(link_uses(data)),
            notes=tuple(self._notes()),
        )

    def _state(self, steps_done: int) -> State:
        """Say how the run is; its summary, written at the end, counts where no later start has written the run file."""
        run, records = self._run, self._recent[self._lead]
        if run.summary.exists() and not _has_begun_again(run):
            summary = read_json(run.summary, ConfigError)
            if summary.get("steps") == steps_done:
                return "stopped" if summary.get("interrupted") else "finished"
        if not records:
            return "starting"
        quiet_s = self._clock() - records[-1].finished_at
        return "silent" if quiet_s > max(_SILENT_AFTER_S, 10 * records[-1].step_s) else "running"

    def _left_s(self, num_steps: int | None, steps_done: int) -> float | None:
        """Return the seconds to the last step at the recent steps' pace, whatever pause lay between two of them."""
        ends = [record.finished_at for record in self._recent[self._lead]]
        if num_steps is None or len(ends) < 2:
            return None
        return statistics.median(b - a for a, b in itertools.pairwise(ends)) * (num_steps - steps_done)

    def _row(self, time: RankTime) -> WorkerRow:
        rank = self._plan.rank_of(time.worker)
        waits = sorted(time.waited_s.items(), key=lambda wait: -wait[1])
        return WorkerRow(
            time.worker,
            self._plan.stage_of(rank),
            self._plan.replica_of(rank),
            self._recent[rank][-1].step,
            time.step_s,
            time.compute_s / time.step_s,
            {peer: seconds / time.step_s for peer, seconds in waits},
        )

    def _notes(self) -> list[str]:
        notes = self._run.notes
        return notes.read_text(encoding="utf-8").splitlines()[-_NUM_NOTES:] if notes.exists() else []


def _has_begun_again(run: RunDirectory) -> bool:
    """Whether the run file was written after the summary: a resumed run that has no step of its own yet."""
    return run.config.exists() and run.config.stat().st_mtime_ns > run.summary.stat().st_mtime_ns
