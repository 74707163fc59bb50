"""What happened in a step that was played, in columns: sums over it are cheap, a list of a million events is not."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.scheduler.script import (
    BYTES,
    END_S,
    ITEM_AT,
    NUM_RECORDS,
    PEER,
    RANK_AT,
    RECORDS,
    START_S,
    STEP,
    WHAT,
    Script,
)
from wantrain.timeline import COMPUTE_KINDS, Event, EventKind, Timeline

_EVENT_KINDS: tuple[EventKind, ...] = (
    "forward", "backward", "reduce", "step", "wait", "send", "encode", "decode", "weights",
)  # fmt: skip
_COMPUTE = [_EVENT_KINDS.index(kind) for kind in COMPUTE_KINDS]
_SEND = _EVENT_KINDS.index("send")

_event = functools.partial(tuple.__new__, Event)
"""An Event from its values in order; three times as fast as `Event._make`, of which a big step needs a million."""


@dataclass(frozen=True)
class PlayedStep:
    """The events of a step, sorted by their start, a column for each field of `Event`."""

    workers: tuple[str, ...]
    step_s: float
    """How long it takes when such steps follow each other."""
    rank: NDArray[np.int64]
    kind: NDArray[np.int64]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    microbatch: NDArray[np.int64]
    peer: NDArray[np.int64]
    """-1: nobody."""
    num_bytes: NDArray[np.int64]

    @classmethod
    def read(
        cls, workers: tuple[str, ...], script: Script, step_s: float, updated_s: NDArray[np.float64] | None
    ) -> PlayedStep:
        """Read what a script recorded; updates end when the ranks' agreement lets them."""
        count = script.ints[NUM_RECORDS]
        start_s, end_s = (script.column(RECORDS, column, count, is_float=True) for column in (START_S, END_S))
        ints = [script.column(RECORDS, column, count) for column in (RANK_AT, WHAT, ITEM_AT, PEER, BYTES)]
        if updated_s is not None:
            updates = np.flatnonzero(ints[1] == STEP)
            end_s = np.array(end_s)
            end_s[updates] = updated_s[ints[0][updates]]
        order = np.argsort(start_s, kind="stable")
        rank, kind, microbatch, peer, num_bytes = (column[order] for column in ints)
        return cls(workers, step_s, rank, kind, start_s[order], end_s[order], microbatch, peer, num_bytes)

    def compute_by_rank(self) -> list[float]:
        """Return the seconds that each rank spent in forwards and backwards."""
        own = np.isin(self.kind, _COMPUTE)
        seconds = (self.end_s - self.start_s)[own]
        each: list[float] = np.bincount(self.rank[own], seconds, minlength=len(self.workers)).tolist()
        return each

    def bytes_by_link(self) -> dict[tuple[str, str], int]:
        """Return wire bytes per directed pair of workers, in the order in which pairs first sent."""
        own = self.kind == _SEND
        count = len(self.workers)
        pairs, first, place = np.unique(self.rank[own] * count + self.peer[own], return_index=True, return_inverse=True)
        sums = np.bincount(place, self.num_bytes[own], minlength=len(pairs))
        return {
            (self.workers[pairs[i] // count], self.workers[pairs[i] % count]): int(sums[i])
            for i in np.argsort(first, kind="stable")
        }

    def timeline(self) -> Timeline:
        """Return the step as a list of events."""
        names = (*self.workers, "")
        columns: tuple[list[Any], ...] = (
            self.rank.tolist(),
            [_EVENT_KINDS[one] for one in self.kind.tolist()],
            self.start_s.tolist(),
            self.end_s.tolist(),
            self.microbatch.tolist(),
            [names[one] for one in self.peer.tolist()],
            self.num_bytes.tolist(),
        )
        with _no_garbage_collection():
            return Timeline("predicted", self.workers, tuple(map(_event, zip(*columns, strict=True))))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Look for no garbage meanwhile: a million new objects, none of them garbage, make it most of the work."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
