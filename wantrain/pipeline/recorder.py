"""Take down what a rank does, as it does it, from any of its threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from wantrain.timeline import Event, EventKind


class Recorder:
    """Collects one rank's events of one step at a time.

    Times are taken on the monotonic clock and written relative to the step's begin; `wall_clock_s` of that begin lets
    the timelines of several machines be laid over each other as well as their clocks agree. On a network slowed by
    `dilation` all times are divided by it again.
    """

    def __init__(self, rank: int, dilation: float = 1.0) -> None:
        self.rank = rank
        self.dilation = dilation
        self._events: list[Event] = []
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the step before; from now on times count from here."""
        self._events = []
        self._began_s = time.monotonic()
        self.wall_clock_s = time.time()

    def add(
        self, kind: EventKind, start_s: float, end_s: float, microbatch: int = -1, peer: str = "", num_bytes: int = 0
    ) -> None:
        """Note something that was done between two readings of the monotonic clock."""
        start_s, end_s = ((time_s - self._began_s) / self.dilation for time_s in (start_s, end_s))
        self._events.append(Event(self.rank, kind, start_s, end_s, microbatch, peer, num_bytes))

    @contextmanager
    def span(self, kind: EventKind, microbatch: int = -1, peer: str = "") -> Iterator[None]:
        """Note what is done inside the `with` block."""
        start_s = time.monotonic()
        yield
        self.add(kind, start_s, time.monotonic(), microbatch, peer)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return (time.monotonic() - self._began_s) / self.dilation

    def events(self) -> tuple[Event, ...]:
        """Return the events of the running step so far."""
        return tuple(self._events)

    def seconds(self, *kinds: EventKind) -> float:
        """Sum the durations of some kinds of events."""
        return sum(event.duration_s for event in tuple(self._events) if event.kind in kinds)

    def waited_s(self) -> dict[str, float]:
        """Sum the waits by whom was waited for."""
        waited: dict[str, float] = {}
        for event in tuple(self._events):
            if event.kind == "wait":
                waited[event.peer] = waited.get(event.peer, 0.0) + event.duration_s
        return waited
