"""A channel over gloo, torch.distributed's transport for sockets, with connections of its own.

Every connection is a gloo group of two (pairs.py). A message on it is 64 bytes of header and one chunk; the receiver
keeps `num_posted` receives posted and copies what arrives into the payload that it belongs to:

    payload 7 ─┬─ chunk 0 ──► connection 0: │7,0│…│  ─► posted │ │ │ │ ─┐
               ├─ chunk 1 ──► connection 1: │7,1│…│  ─► posted │ │ │ │ ─┼─► payload 7
               └─ chunk 2 ──► connection 0: │7,2│…│  ─► posted │ │ │ │ ─┘

How gloo behaves, and what follows from that, stands in connection.py; who goes first, in sender.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

from torch import Tensor
from torch._C._distributed_c10d import Store

from wantrain.codecs.codec import new_payload
from wantrain.comm.channel import Channel, ChannelStats, SendEvent, Sending, late
from wantrain.comm.connection import MESSAGE_HEADER_BYTES, Connection
from wantrain.comm.gloo import Device, Pair, reason
from wantrain.comm.pairs import Wanted, connect_pairs
from wantrain.comm.sender import Chunk, Outlet, Sender
from wantrain.errors import ChannelError
from wantrain.wire import Transport


class Opening(NamedTuple):
    """A channel to be opened; the peer opens one of the same name to this rank."""

    name: str
    peer_rank: int
    peer: str
    """What errors call it."""
    sender: Sender
    transport: Transport = Transport()
    priority: int = 0
    on_event: SendEvent | None = None


@dataclass
class _Assembly:
    """A payload that is arriving."""

    payload: Tensor
    missing_bytes: int


class TorchChannel(Channel):
    """One stream to one peer over one or more gloo connections. Made by `open_channels`."""

    def __init__(
        self,
        peer: str,
        connections: list[Connection],
        sender: Sender,
        outlet: Outlet,
        on_event: SendEvent | None,
    ) -> None:
        self.peer = peer
        self.stats = ChannelStats()
        self._connections = connections
        self._sender = sender
        self._outlet = outlet
        self._on_event = on_event
        self._changed = threading.Condition()
        self._error: ChannelError | None = None
        self._is_closed = False
        self._num_closed_by_peer = 0
        self._num_sent = 0
        self._leaving: dict[Sending, int] = {}  # and how many of its bytes have not left
        self._num_received = 0
        self._assemblies: dict[int, _Assembly] = {}
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"wantrain-{what}-{peer}", daemon=True)
            for connection in connections
            for what, loop in (
                ("send", partial(connection.send_loop, self._take, self._left)),
                ("recv", partial(connection.recv_loop, self._arrived, self._closed_by_peer)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def send(self, payload: Tensor) -> Sending:
        """Hand a payload to the Sender."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._is_closed or self._num_closed_by_peer:
                raise ChannelError(f"the channel to '{self.peer}' is closed; nothing more can be sent")
            sending = Sending(self._num_sent, payload, self.peer)
            self._num_sent += 1
            self._leaving[sending] = sending.num_bytes
            self.stats.start_sending()
            self._sender.submit(self._outlet, sending)
        return sending

    def recv(self, timeout_s: float, awaited: str) -> Tensor:
        """Return the next payload."""
        with self._changed:
            if not self._changed.wait_for(self._is_decided, timeout_s):
                raise late(self.peer, timeout_s, awaited)
            if not self._is_whole() or self._is_closed:
                why = self._error or f"the channel to '{self.peer}' is closed"
                raise ChannelError(f"{why}; awaited {awaited}")
            payload = self._assemblies.pop(self._num_received).payload
            self._num_received += 1
            self.stats.payload_bytes_received += payload.numel()
            return payload

    def ready(self) -> bool:
        """Return whether the next payload has arrived whole."""
        with self._changed:
            return self._is_whole() and not self._is_closed

    def close(self, timeout_s: float) -> None:
        """Send what waits, then the closing messages; wait for the peer's."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._sender.close(self._outlet)
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        if self._error is not None:
            raise self._error
        if any(thread.is_alive() for thread in self._threads):
            raise ChannelError(f"'{self.peer}' did not close its end within {timeout_s:g} s; is it running?")
        self._assemblies.clear()
        self._connections.clear()

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run a connection's loop; what gloo raises there means that the peer is gone."""
        try:
            loop()
        except RuntimeError as caught:
            self._fail(ChannelError(f"lost the connection to '{self.peer}' ({reason(caught)}); is it still running?"))

    def _fail(self, error: ChannelError) -> None:
        with self._changed:
            self._error = self._error or error
            lost = list(self._leaving)
            self._leaving.clear()
            self._changed.notify_all()
        self._sender.close(self._outlet, drop=True)
        for sending in lost:
            sending.end(error)

    def _take(self, block: bool) -> Chunk | None:
        chunk = self._sender.take(self._outlet, block)
        if chunk is not None and chunk.offset == 0:
            chunk.sending.start_s = time.monotonic()
        return chunk

    def _left(self, chunk: Chunk, wire_bytes: int) -> None:
        self._sender.release(self._outlet, chunk.num_bytes)
        sending = chunk.sending
        with self._changed:
            self.stats.wire_bytes_sent += wire_bytes
            if sending not in self._leaving:
                return
            self._leaving[sending] -= chunk.num_bytes
            if self._leaving[sending]:
                return
            del self._leaving[sending]
            self.stats.end_sending(sending.num_bytes)
        if self._on_event is not None:
            self._on_event(sending.index, sending.start_s, time.monotonic(), sending.num_bytes)
        sending.end()

    def _arrived(self, index: int, offset: int, total: int, data: Tensor) -> None:
        with self._changed:
            assembly = self._assemblies.get(index)
            if assembly is None:
                assembly = self._assemblies[index] = _Assembly(new_payload(total), total)
        assembly.payload[offset : offset + data.numel()].numpy()[:] = data.numpy()
        with self._changed:
            self.stats.wire_bytes_received += MESSAGE_HEADER_BYTES + data.numel()
            assembly.missing_bytes -= data.numel()
            if self._is_whole():
                self._changed.notify_all()

    def _closed_by_peer(self) -> None:
        with self._changed:
            self._num_closed_by_peer += 1
            self._changed.notify_all()

    def _is_whole(self) -> bool:
        assembly = self._assemblies.get(self._num_received)
        return assembly is not None and assembly.missing_bytes == 0

    def _is_decided(self) -> bool:
        return self._is_whole() or self._is_closed or self._has_ended() or self._error is not None

    def _has_ended(self) -> bool:
        return self._num_closed_by_peer == len(self._connections)


def open_channels(
    store: Store, rank: int, asked: Sequence[Opening], *, timeout_s: float = 60.0, address: str | None = None
) -> list[TorchChannel]:
    """Connect to the peers, each of which opens the channels between the two in one call as well.

    All connections are made at once (pairs.py). No other thread uses the store meanwhile. `address` is the local one to
    listen on, by default that of GLOO_SOCKET_IFNAME, or of the host's name. Raise ChannelError where a peer doesn't
    come, ConfigError where one asks for another transport.
    """
    wanted = [
        Wanted(one.peer_rank, f"{one.name}/{number}")
        for one in asked
        for number in range(one.transport.num_connections)
    ]
    names = {one.peer_rank: f"'{one.peer}'" for one in asked}
    terms: dict[int, dict[str, str]] = {peer: {} for peer in names}
    for one in asked:
        terms[one.peer_rank][one.name] = repr(one.transport)
    pairs = iter(connect_pairs(store, rank, wanted, Device(address), timeout_s, names=names, terms=terms))
    return [_channel(one, list(islice(pairs, one.transport.num_connections))) for one in asked]


def _channel(opening: Opening, pairs: Sequence[Pair]) -> TorchChannel:
    transport = opening.transport
    outlet = opening.sender.open(opening.priority, transport.chunk_bytes, transport.num_connections)
    connections = [Connection(pair, transport) for pair in pairs]
    return TorchChannel(opening.peer, connections, opening.sender, outlet, opening.on_event)
