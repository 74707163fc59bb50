"""Who goes first on the wire: everything that a process sends leaves through one Sender.

A payload waits in its channel's outlet and leaves in chunks. The threads of the channel's connections take chunks when
they are free, in the order in which they became it, so one payload spreads over all of them and a slow one takes fewer.
(Were it whoever asks first, a few would fill their sockets and need another round trip: TCP's window is as wide on each
as what it has carried before. Seen at 500 Mbit/s and 100 ms one way, 6.6 MB over seven: 330 ms instead of 210.) Order
is by priority (activations and their gradients before weight gradients), then by when a payload was handed in.

Between channels the order matters only where they share a line. There `max_bytes_under_way` bounds what all of them
have under way together: a chunk is then given out only while no payload that comes earlier could use the room. It must
be above what the fullest link needs (rate × round trip), or the line idles.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from wantrain.comm.channel import Sending

PIPELINE_PRIORITY = 0
REDUCE_PRIORITY = 1

_SPREAD_BYTES = 64 * 1024
"""Least chunk when a small payload is spread over connections: below it the chunk's fixed cost is the larger part."""


class Chunk(NamedTuple):
    """A part of a payload for one connection."""

    sending: Sending
    offset: int
    num_bytes: int


@dataclass(eq=False)
class _Waiting:
    """A payload in an outlet, and how much of it has been given out."""

    order: tuple[int, int]
    sending: Sending
    chunk_bytes: int
    offset: int = 0

    def next_bytes(self) -> int:
        return min(self.chunk_bytes, self.sending.num_bytes - self.offset)


@dataclass(eq=False)
class Outlet:
    """One channel's place in a Sender."""

    priority: int
    chunk_bytes: int
    num_connections: int
    queue: deque[_Waiting] = field(default_factory=deque)
    idle: deque[threading.Condition] = field(default_factory=deque)
    """Connections that wait for a chunk, the one that has waited longest first."""
    under_way_bytes: int = 0
    is_closed: bool = False

    def chunk_bytes_for(self, num_bytes: int) -> int:
        """Return the chunk that lets every connection carry a share of a payload, where it is not tiny."""
        share = -(-num_bytes // self.num_connections)
        return min(self.chunk_bytes, max(share, _SPREAD_BYTES))


class Sender:
    """Gives chunks to the connections of all channels of a process, in order."""

    def __init__(self, max_bytes_under_way: int | None = None) -> None:
        self.max_bytes_under_way = max_bytes_under_way
        self._lock = threading.Lock()
        self._outlets: list[Outlet] = []
        self._under_way_bytes = 0
        self._num_submitted = 0

    def open(self, priority: int, chunk_bytes: int, num_connections: int) -> Outlet:
        """Return a new outlet; the least priority goes first."""
        outlet = Outlet(priority, chunk_bytes, num_connections)
        with self._lock:
            self._outlets.append(outlet)
        return outlet

    def submit(self, outlet: Outlet, sending: Sending) -> None:
        """Put a payload at the end of its outlet; a closed outlet drops it."""
        with self._lock:
            if outlet.is_closed:
                return
            order = (outlet.priority, self._num_submitted)
            self._num_submitted += 1
            outlet.queue.append(_Waiting(order, sending, outlet.chunk_bytes_for(sending.num_bytes)))
            self._wake()

    def take(self, outlet: Outlet, block: bool) -> Chunk | None:
        """Return the chunk that a free connection carries next; others that have been free for longer go first.

        Without one, wait, or return None at once if not `block`; return None too when a closed outlet is empty.
        """
        turn = threading.Condition(self._lock)
        with self._lock:
            outlet.idle.append(turn)
            try:
                while (chunk := self._grant(outlet) if outlet.idle[0] is turn else None) is None:
                    if not block or (outlet.is_closed and not outlet.queue):
                        return None
                    turn.wait()
            finally:
                outlet.idle.remove(turn)
                self._wake()
            self._end_if_drained(outlet)
            return chunk

    def release(self, outlet: Outlet, num_bytes: int) -> None:
        """Say that a chunk has left."""
        with self._lock:
            outlet.under_way_bytes -= num_bytes
            self._under_way_bytes -= num_bytes
            self._wake()

    def close(self, outlet: Outlet, drop: bool = False) -> None:
        """Take nothing more; what waits still leaves, or is dropped together with what was under way."""
        with self._lock:
            outlet.is_closed = True
            if drop:
                outlet.queue.clear()
                self._under_way_bytes -= outlet.under_way_bytes
                outlet.under_way_bytes = 0
            self._end_if_drained(outlet)
            self._wake()

    def _end_if_drained(self, outlet: Outlet) -> None:
        """Forget a closed outlet once it is empty, and send home who waits at it."""
        if outlet.is_closed and not outlet.queue:
            if outlet in self._outlets:
                self._outlets.remove(outlet)
            for turn in outlet.idle:
                turn.notify()

    def _grant(self, outlet: Outlet) -> Chunk | None:
        if not outlet.queue:
            return None
        waiting = outlet.queue[0]
        num_bytes = waiting.next_bytes()
        if self.max_bytes_under_way is not None and not self._may_go(outlet, waiting.order, num_bytes):
            return None
        chunk = Chunk(waiting.sending, waiting.offset, num_bytes)
        waiting.offset += num_bytes
        if waiting.offset == waiting.sending.num_bytes:
            outlet.queue.popleft()
        outlet.under_way_bytes += num_bytes
        self._under_way_bytes += num_bytes
        return chunk

    def _may_go(self, outlet: Outlet, order: tuple[int, int], num_bytes: int) -> bool:
        if not self._has_room(num_bytes):
            return False
        others = (other for other in self._outlets if other is not outlet and other.idle and other.queue)
        return all(order < other.queue[0].order for other in others)

    def _has_room(self, num_bytes: int) -> bool:
        if self.max_bytes_under_way is None or self._under_way_bytes == 0:
            return True
        return self._under_way_bytes + num_bytes <= self.max_bytes_under_way

    def _wake(self) -> None:
        """Wake the next idle connection of every outlet that could go on, in order, while there is room."""
        able = [outlet for outlet in self._outlets if outlet.idle and outlet.queue]
        for outlet in sorted(able, key=lambda outlet: outlet.queue[0].order):
            if not self._has_room(outlet.queue[0].next_bytes()):
                return
            outlet.idle[0].notify()
            if self.max_bytes_under_way is not None:
                return
