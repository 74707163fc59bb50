"""The contract to one peer: payloads go in on one end and come out on the other, whole and in order.

A channel is one stream to one peer. Both ends may have many payloads under way at once, in both directions, and may
send before they receive: `send` never waits. How much is under way is the caller's business (a schedule bounds it).
Every wait has a time-out that names the peer and what was awaited; a peer that is gone ends every wait at once. A
channel ends by agreement: both sides close, everything sent is received, no thread is left.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wantrain.errors import ChannelError

SendEvent = Callable[[int, float, float, int], None]
"""Called with (payload index, start_s, end_s, num_bytes) when a payload has left; times are time.monotonic()'s."""


class Sending:
    """A payload on its way out; the channel owns its memory until `done`."""

    def __init__(self, index: int, payload: Tensor, peer: str) -> None:
        if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous() or payload.is_cuda:
            raise ValueError(f"a payload is one-dimensional contiguous uint8 on the CPU (got {payload.dtype})")
        self.index = index
        self.payload = payload
        self.num_bytes = payload.numel()
        self.peer = peer
        self.start_s = 0.0
        self._ended = threading.Event()
        self._error: ChannelError | None = None

    @property
    def done(self) -> bool:
        """Whether the payload's memory is the caller's again."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until done; raise ChannelError where the peer is gone or takes nothing for `timeout_s`."""
        if not self._ended.wait(timeout_s):
            raise ChannelError(
                f"payload {self.index} ({self.num_bytes} bytes) was not taken by '{self.peer}' within {timeout_s:g} s; "
                "is it running, and the link up?"
            )
        if self._error is not None:
            raise self._error

    def end(self, error: ChannelError | None = None) -> None:
        """Mark as done, or as failed; only a channel calls this."""
        self._error = error
        self._ended.set()


@dataclass
class ChannelStats:
    """What a channel has moved: payload bytes, and wire bytes with the channel's own headers (not TCP's)."""

    payload_bytes_sent: int = 0
    wire_bytes_sent: int = 0
    payload_bytes_received: int = 0
    wire_bytes_received: int = 0
    busy_s: float = 0.0
    """Seconds in which at least one payload was on its way out."""
    _under_way: int = field(default=0, repr=False)
    _busy_since_s: float = field(default=0.0, repr=False)

    def start_sending(self) -> None:
        """Count one payload more under way."""
        if self._under_way == 0:
            self._busy_since_s = time.monotonic()
        self._under_way += 1

    def end_sending(self, payload_bytes: int) -> None:
        """Count a payload as sent."""
        self.payload_bytes_sent += payload_bytes
        self._under_way -= 1
        if self._under_way == 0:
            self.busy_s += time.monotonic() - self._busy_since_s


class Channel(ABC):
    """One stream of payloads to and from one peer. All methods may be called from any thread."""

    peer: str
    stats: ChannelStats

    @abstractmethod
    def send(self, payload: Tensor) -> Sending:
        """Start to send a uint8 CPU tensor and return at once; the channel owns it until `Sending.done`."""

    @abstractmethod
    def recv(self, timeout_s: float, awaited: str) -> Tensor:
        """Return the next payload in order, a fresh tensor.

        Raise ChannelError after `timeout_s`, or at once where the peer is gone or has closed; it says `awaited`.
        """

    @abstractmethod
    def ready(self) -> bool:
        """Return whether `recv` would return at once."""

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """End by agreement: wait until all is sent and the peer closes too, then end every thread.

        Payloads that arrive and were not received are dropped. Raise ChannelError where the peer doesn't agree in time.
        """


class TwoWay(Channel):
    """Two channels to one peer as one: `out` only sends, `back` only receives. At the peer they are the other way."""

    def __init__(self, out: Channel, back: Channel) -> None:
        self.peer = out.peer
        self._out, self._back = out, back

    @property
    def stats(self) -> ChannelStats:  # type: ignore[override]
        """Return what has gone out on one and come back on the other."""
        back = self._back.stats
        return replace(
            self._out.stats,
            payload_bytes_received=back.payload_bytes_received,
            wire_bytes_received=back.wire_bytes_received,
        )

    def send(self, payload: Tensor) -> Sending:
        return self._out.send(payload)

    def recv(self, timeout_s: float, awaited: str) -> Tensor:
        return self._back.recv(timeout_s, awaited)

    def ready(self) -> bool:
        return self._back.ready()

    def close(self, timeout_s: float) -> None:
        with ThreadPoolExecutor(2) as pool:  # the peer may wait for either first
            list(pool.map(lambda channel: channel.close(timeout_s), (self._out, self._back)))


def late(peer: str, timeout_s: float, awaited: str) -> ChannelError:
    """Return the error of a payload that didn't come in time."""
    return ChannelError(f"no payload from '{peer}' within {timeout_s:g} s; awaited {awaited}")
