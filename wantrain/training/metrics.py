"""Write what a rank measured, one JSON line at a time, into the run directory."""

from __future__ import annotations

import json
import sys
from typing import Any

from wantrain.fact import append_line, write_text
from wantrain.pipeline.recorder import Recorder
from wantrain.run_directory import RunDirectory, StepRecord, ValidationRecord, read_lines


class MetricsWriter:
    """One rank's metrics and timelines; a resumed run first drops the lines of steps that are done again."""

    def __init__(self, run: RunDirectory, rank: int, first_step: int) -> None:
        self._metrics, self._timelines = run.metrics(rank), run.timelines(rank)
        for path in (self._metrics, self._timelines):
            kept = [line for line in read_lines(path) if line["step"] < first_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, record: StepRecord | ValidationRecord) -> None:
        """Add one line."""
        append_line(self._metrics, record.model_dump_json())

    def write_timeline(self, step: int, recorder: Recorder) -> None:
        """Add the events of a step, with the wall clock of its begin."""
        events = [[round(v, 6) if isinstance(v, float) else v for v in event] for event in recorder.events()]
        line: dict[str, Any] = {
            "step": step,
            "began_at": recorder.wall_clock_s,
            "dilation": recorder.dilation,
            "events": events,
        }
        append_line(self._timelines, json.dumps(line))


def announce(run_directory: RunDirectory, rank: int, text: str) -> None:
    """Tell the user, once: on rank 0's standard error, and in the run directory, where a launcher looks for it."""
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
        append_line(run_directory.notes, text)
