"""A Timeline as a trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) open.

A rank is a process; its tracks are what it does, what it codes, and what it has on the wire to each peer. What overlaps
on a track gets a further one, since a track's slices may only nest. Counters show what each link carries: means over
short spans, a send's bytes spread evenly over its time.

Format: "Trace Event Format" (Google, 2016), JSON object form: complete events "X" in microseconds, counters "C", names
as "M".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wantrain.errors import ConfigError
from wantrain.fact import write_text
from wantrain.run_directory import RunDirectory
from wantrain.timeline import Event, Timeline, merge

_US_PER_S = 1e6

_NUM_SPANS = 200
"""Chosen: means of a link's rate in a step; fine enough to see its microbatches."""


def trace_of(timeline: Timeline) -> dict[str, Any]:
    """Return the trace, ready to be written as JSON."""
    return {
        "traceEvents": [*_names(timeline), *_slices(timeline), *_counters(timeline)],
        "displayTimeUnit": "ms",
        "otherData": {"source": timeline.source, "step": timeline.step},
    }


def save_trace(timeline: Timeline, path: str | Path) -> None:
    """Write the trace; raise ConfigError where it can't be written."""
    write_text(path, json.dumps(trace_of(timeline)) + "\n")


def save_run_trace(run: RunDirectory, workers: tuple[str, ...], path: str | Path, step: int | None = None) -> None:
    """Write what was measured of a run's recorded steps, one after the other, or of one of them.

    Raises ConfigError where nothing, or not that step, was recorded.
    """
    recorded = run.read_timelines(workers)
    chosen = [timeline for timeline in recorded if step in (None, timeline.step)]
    if not chosen:
        known = ", ".join(str(timeline.step) for timeline in recorded)
        asked = "no step" if step is None else f"step {step}"
        raise ConfigError(f"{asked} of {run.path} was recorded by all workers (there are: {known or 'none'})")
    save_trace(in_a_row(chosen), path)


def in_a_row(timelines: Sequence[Timeline]) -> Timeline:
    """Join timelines of several steps into one: each begins where the one before it ends."""
    events: list[Event] = []
    end_s = 0.0
    for timeline in timelines:
        shift_s = end_s - min((event.start_s for event in timeline.events), default=end_s)
        events += [
            event._replace(start_s=event.start_s + shift_s, end_s=event.end_s + shift_s) for event in timeline.events
        ]
        end_s += timeline.span_s
    return merge(timelines[0].source, timelines[0].workers, timelines[0].step, events)


def _names(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for rank, worker in enumerate(timeline.workers):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": worker}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}


def _slices(timeline: Timeline) -> Iterator[dict[str, Any]]:
    numbers: dict[tuple[int, str], int] = {}
    free_s: dict[tuple[int, str], float] = {}
    for event in sorted(timeline.events, key=lambda event: event.start_s):
        track = _free_track(event, free_s)
        if (event.rank, track) not in numbers:
            number = numbers[event.rank, track] = sum(rank == event.rank for rank, _ in numbers)
            yield {"ph": "M", "name": "thread_name", "pid": event.rank, "tid": number, "args": {"name": track}}
        free_s[event.rank, track] = event.end_s
        yield {
            "ph": "X",
            "name": _name(event),
            "cat": event.kind,
            "pid": event.rank,
            "tid": numbers[event.rank, track],
            "ts": event.start_s * _US_PER_S,
            "dur": event.duration_s * _US_PER_S,
            "args": {"microbatch": event.microbatch, "bytes": event.num_bytes},
        }


def _counters(timeline: Timeline) -> Iterator[dict[str, Any]]:
    sends: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in timeline.events:
        if event.kind == "send":
            sends[event.rank, event.peer].append(event)
    if not sends or not timeline.span_s:
        return
    begin_s = min(event.start_s for event in timeline.events)
    width_s = timeline.span_s / _NUM_SPANS
    for (rank, peer), events in sorted(sends.items()):
        before = None
        for i, sent_bytes in enumerate([*_by_span(events, begin_s, width_s), 0.0]):
            rate = round(sent_bytes * 8 / width_s / 1e6, 6)
            if rate != before:
                yield {
                    "ph": "C",
                    "name": f"to {peer}, Mbit/s",
                    "pid": rank,
                    "ts": (begin_s + i * width_s) * _US_PER_S,
                    "args": {"Mbit/s": rate},
                }
            before = rate


def _by_span(sends: Sequence[Event], begin_s: float, width_s: float) -> list[float]:
    """Return the bytes sent in each span of a step, a send's spread evenly over its time."""
    spans = [0.0] * _NUM_SPANS
    for event in sends:
        first, end = ((time_s - begin_s) / width_s for time_s in (event.start_s, event.end_s))
        at = min(int(first), _NUM_SPANS - 1)
        last = max(at, min(math.ceil(end) - 1, _NUM_SPANS - 1))
        for span in range(at, last + 1):
            share = 1.0 if at == last else (min(end, span + 1) - max(first, span)) / (end - first)
            spans[span] += share * event.num_bytes
    return spans


def _free_track(event: Event, free_s: dict[tuple[int, str], float]) -> str:
    """Return the first track of the event's kind on which nothing goes on any more."""
    name = track = _track(event)
    number = 1
    while free_s.get((event.rank, track), event.start_s) > event.start_s:
        number += 1
        track = f"{name} ({number})"
    return track


def _track(event: Event) -> str:
    if event.kind == "send":
        return f"to {event.peer}"
    return "codec" if event.kind in ("encode", "decode") else "work"


def _name(event: Event) -> str:
    what = "gradients" if event.kind in ("send", "wait", "encode", "decode") else ""
    return f"{event.kind} {event.microbatch if event.microbatch >= 0 else what}".strip()
