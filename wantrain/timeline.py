"""What happened when: one format for what the simulator predicts and what the executor measures.

Times are seconds since the step began on the job's clock. An event belongs to a rank; `peer` names the other end of a
transfer or of a wait. On disk: one JSON object, {"version": 1, "source": "measured", "events": [...]}.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wantrain.errors import ConfigError
from wantrain.fact import read_json, write_text

VERSION = 1

EventKind = Literal["forward", "backward", "reduce", "step", "wait", "send", "encode", "decode", "weights"]
"""Where there are "weights", gradients of weights are made there, and a backward makes those of inputs alone."""

COMPUTE_KINDS: tuple[EventKind, ...] = ("forward", "backward", "weights")


class Event(NamedTuple):
    """Something one rank did from `start_s` to `end_s`; `microbatch` is -1 where there is none."""

    rank: int
    kind: EventKind
    start_s: float
    end_s: float
    microbatch: int = -1
    peer: str = ""
    num_bytes: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Timeline(NamedTuple):
    """All events of one step, of every rank."""

    source: Literal["predicted", "measured"]
    workers: tuple[str, ...]
    events: tuple[Event, ...]
    step: int = 0

    @property
    def span_s(self) -> float:
        """Seconds from the first event's start to the last one's end."""
        if not self.events:
            return 0.0
        return max(event.end_s for event in self.events) - min(event.start_s for event in self.events)

    def of_rank(self, rank: int) -> Iterator[Event]:
        """Yield one rank's events."""
        return (event for event in self.events if event.rank == rank)

    def compute_by_rank(self) -> list[float]:
        """Seconds that each rank spent in forwards and backwards, those of weights included."""
        seconds = [0.0] * len(self.workers)
        for event in self.events:
            if event.kind in COMPUTE_KINDS:
                seconds[event.rank] += event.duration_s
        return seconds

    def bytes_by_link(self) -> dict[tuple[str, str], int]:
        """Wire bytes per directed pair of workers."""
        sent: dict[tuple[str, str], int] = defaultdict(int)
        for event in self.events:
            if event.kind == "send":
                sent[self.workers[event.rank], event.peer] += event.num_bytes
        return dict(sent)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form that is written to disk."""
        return {
            "version": VERSION,
            "source": self.source,
            "step": self.step,
            "workers": list(self.workers),
            "fields": list(Event._fields),
            "events": [[round(v, 7) if isinstance(v, float) else v for v in event] for event in self.events],
        }

    def save(self, path: str | Path) -> None:
        """Write the timeline as JSON."""
        write_text(path, json.dumps(self.to_dict()))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Timeline:
        """Read the plain form; raise ConfigError where it is not a timeline of this version."""
        if data.get("version") != VERSION or data.get("fields") != list(Event._fields):
            raise ConfigError(f"{source} is not a timeline of version {VERSION}")
        events = tuple(Event(*row) for row in data["events"])
        return cls(data["source"], tuple(data["workers"]), events, data.get("step", 0))

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read a timeline from a JSON file."""
        return cls.from_dict(read_json(path, ConfigError), str(path))


def merge(
    source: Literal["predicted", "measured"], workers: Iterable[str], step: int, events: Iterable[Event]
) -> Timeline:
    """Join the events of all ranks, sorted by start."""
    return Timeline(source, tuple(workers), tuple(sorted(events, key=lambda event: event.start_s)), step)
