"""A Timeline as a trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) open.

A rank is a process; its tracks are what it does, what it codes, and what it has on the wire to each peer. What overlaps
on a track gets a further one, since a track's slices may only nest.

Format: "Trace Event Format" (Google, 2016), JSON object form: complete events "X" in microseconds, names as "M".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wantrain.fact import write_text
from wantrain.timeline import Event, Timeline

_US_PER_S = 1e6


def trace_of(timeline: Timeline) -> dict[str, Any]:
    """Return the trace, ready to be written as JSON."""
    return {
        "traceEvents": [*_names(timeline), *_slices(timeline)],
        "displayTimeUnit": "ms",
        "otherData": {"source": timeline.source, "step": timeline.step},
    }


def save_trace(timeline: Timeline, path: str | Path) -> None:
    """Write the trace; raise ConfigError where it can't be written."""
    write_text(path, json.dumps(trace_of(timeline)) + "\n")


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
