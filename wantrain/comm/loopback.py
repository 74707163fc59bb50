"""A job in one process, a thread per rank: the same contracts without a network, for tests and small experiments."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wantrain.comm.channel import Channel, ChannelStats, SendEvent, Sending, late
from wantrain.comm.groups import Membership
from wantrain.comm.torch_channel import Opening
from wantrain.errors import ChannelError


class LoopbackChannel(Channel):
    """One end; a payload is copied when it is sent, so it is done at once. Made by `loopback_pair`."""

    def __init__(self, peer: str, changed: threading.Condition, on_event: SendEvent | None) -> None:
        self.peer = peer
        self.stats = ChannelStats()
        self._changed = changed
        self.on_event = on_event
        self._arrived: deque[Tensor] = deque()
        self._num_sent = 0
        self._is_closed = False
        self._other: LoopbackChannel

    def send(self, payload: Tensor) -> Sending:
        """Copy the payload into the other end's queue."""
        sending = Sending(self._num_sent, payload, self.peer)
        sending.start_s = time.monotonic()
        with self._changed:
            if self._is_closed or self._other._is_closed:
                raise ChannelError(f"the channel to '{self.peer}' is closed; nothing more can be sent")
            self._num_sent += 1
            self.stats.start_sending()
            self._other._arrived.append(payload.clone())
            self.stats.end_sending(sending.num_bytes)
            self.stats.wire_bytes_sent += sending.num_bytes
            self._changed.notify_all()
        if self.on_event is not None:
            self.on_event(sending.index, sending.start_s, time.monotonic(), sending.num_bytes)
        sending.end()
        return sending

    def recv(self, timeout_s: float, awaited: str) -> Tensor:
        """Return the next payload."""
        with self._changed:
            if not self._changed.wait_for(self._is_decided, timeout_s):
                raise late(self.peer, timeout_s, awaited)
            if self._is_closed or not self._arrived:
                raise ChannelError(f"the channel to '{self.peer}' is closed; awaited {awaited}")
            payload = self._arrived.popleft()
            self.stats.payload_bytes_received += payload.numel()
            self.stats.wire_bytes_received += payload.numel()
            return payload

    def _is_decided(self) -> bool:
        return bool(self._arrived) or self._is_closed or self._other._is_closed

    def ready(self) -> bool:
        """Return whether a payload has arrived."""
        with self._changed:
            return bool(self._arrived) and not self._is_closed

    def close(self, timeout_s: float) -> None:
        """Close this end and wait for the other."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._other._is_closed, timeout_s):
                raise ChannelError(f"'{self.peer}' did not close its end within {timeout_s:g} s; is it running?")
            self._arrived.clear()


def loopback_pair(
    name_a: str, name_b: str, on_event_a: SendEvent | None = None, on_event_b: SendEvent | None = None
) -> tuple[LoopbackChannel, LoopbackChannel]:
    """Return the ends that workers a and b hold: the first sends to b, the second to a."""
    changed = threading.Condition()
    a, b = LoopbackChannel(name_b, changed, on_event_a), LoopbackChannel(name_a, changed, on_event_b)
    a._other, b._other = b, a
    return a, b


class LoopbackJob:
    """What the ranks of a job in one process share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.said: dict[int, dict[int, Any]] = defaultdict(dict)
        self.pairs: dict[str, list[LoopbackChannel]] = {}

    def member(self, rank: int) -> LoopbackMembership:
        """Return one rank's place; each is for a thread of its own."""
        return LoopbackMembership(self, rank)


class LoopbackMembership(Membership):
    """A rank's place in a job in one process."""

    def __init__(self, job: LoopbackJob, rank: int) -> None:
        self.rank, self.world_size = rank, job.world_size
        self._job = job
        self._num_gathers = 0

    def all_exchange(self, values: Sequence[float], timeout_s: float, awaited: str = "values") -> list[list[float]]:
        """Hand a copy to every other rank."""
        rows: list[list[float]] = self.gather(list(values), timeout_s)
        if any(len(row) != len(values) for row in rows):
            raise ChannelError(f"the ranks sent {[len(row) for row in rows]} {awaited}; use one version")
        return rows

    def expect_exchange(self, num_values: int, awaited: str = "values") -> None:
        """There is nobody to tell."""

    def gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Wait until every rank has said its value."""
        with self._job.changed:
            said = self._job.said[self._num_gathers]
            self._num_gathers += 1
            said[self.rank] = value
            self._job.changed.notify_all()
            if not self._job.changed.wait_for(lambda: len(said) == self.world_size, timeout_s):
                missing = sorted(set(range(self.world_size)) - set(said))
                raise ChannelError(f"rank {missing[0]} did not answer within {timeout_s:g} s; is it running?")
        return [said[rank] for rank in range(self.world_size)]

    def open_channels(self, asked: Sequence[Opening], timeout_s: float) -> list[Channel]:
        """Return this rank's ends; whoever comes first makes the pair."""
        return [self._end(one) for one in asked]

    def _end(self, opening: Opening) -> Channel:
        with self._job.changed:
            if opening.name not in self._job.pairs:
                self._job.pairs[opening.name] = list(loopback_pair("", ""))
            end = self._job.pairs[opening.name][int(self.rank > opening.peer_rank)]
            end.peer, end.on_event = opening.peer, opening.on_event
        return end

    def leave(self, timeout_s: float) -> None:
        """Wait for all."""
        self.gather("left", timeout_s)
