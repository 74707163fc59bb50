"""Packets to measure an emulated network with: from one process, by sockets that live in the workers' namespaces.

A socket belongs to the network namespace that its thread was in when it was made. So the measuring process steps into a
worker's namespace, opens a socket, and steps back; after that any thread may use it. All clocks are then one clock, and
the one-way latency of a packet is simply when it came minus when it was sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from wantrain.errors import EmulationError
from wantrain.netem.delayline import run_soon

_CLONE_NEWNET = 0x40000000
_SEND_BYTES = 1 << 18
"""Chosen: large enough that the interpreter costs nothing beside the copy, small beside any buffer."""

_TIMEOUT_S = 20.0
_PROBE = struct.Struct("=Qd")

Pair = tuple[str, str]


@contextlib.contextmanager
def in_namespace(worker: str) -> Iterator[None]:
    """Let this thread open sockets in a worker's network namespace."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with Path("/proc/thread-self/ns/net").open() as own, Path("/run/netns", worker).open() as its:
        if setns(its.fileno(), _CLONE_NEWNET) != 0:
            raise EmulationError(f"can't enter the namespace of '{worker}' ({os.strerror(ctypes.get_errno()).lower()})")
        try:
            yield
        finally:
            setns(own.fileno(), _CLONE_NEWNET)


_UNSHAKEN = b"bbr"
"""A flow without end fills every queue. What is lost when a busy machine lets one run over must not slow it for
seconds, as it does Reno; the line's rate is asked for, not TCP's."""


class Flow:
    """One TCP connection from one worker to another that is kept full until closed."""

    def __init__(self, pair: Pair, address: str) -> None:
        self.received_bytes = 0
        with in_namespace(pair[1]):
            listener = socket.create_server((address, 0))
        listener.settimeout(_TIMEOUT_S)
        with listener, in_namespace(pair[0]):
            self._source = socket.create_connection(listener.getsockname(), timeout=_TIMEOUT_S)
            self._target = listener.accept()[0]
        with contextlib.suppress(OSError):  # a kernel without it: what the network has by default
            self._source.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNSHAKEN)
        self._source.settimeout(None)
        self._target.settimeout(None)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._receive, self._send)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        block = memoryview(os.urandom(_SEND_BYTES))
        with contextlib.suppress(OSError):  # closed from outside: the measurement is over
            while True:
                self._source.send(block)

    def _receive(self) -> None:
        buffer = bytearray(4 * _SEND_BYTES)
        with contextlib.suppress(OSError):
            while got := self._target.recv_into(buffer):
                self.received_bytes += got

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Reset the connection, so that nothing queued in it disturbs the next measurement."""
        for sock in (self._source, self._target):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._source.close()
        self._target.close()


def payload_rates(
    pairs: dict[Pair, str], enough_bytes_per_s: dict[Pair, float], warm_up_s: float, timed_s: float
) -> dict[Pair, float]:
    """Keep every pair (with its target's address) busy at once; return the TCP payload each gets, in bytes per second.

    The warm-up ends as soon as every flow has had enough for a moment, and after `warm_up_s` at the latest.
    """
    with contextlib.ExitStack() as stack:
        flows = {pair: stack.enter_context(Flow(pair, address)) for pair, address in pairs.items()}
        deadline, window_s = time.monotonic() + warm_up_s, max(0.1, warm_up_s / 20)
        while time.monotonic() < deadline:
            rates = _rates_over(flows, window_s)
            if all(rates[pair] >= enough for pair, enough in enough_bytes_per_s.items()):
                break
        return _rates_over(flows, timed_s)


def _rates_over(flows: dict[Pair, Flow], seconds: float) -> dict[Pair, float]:
    began, before = time.monotonic(), {pair: flow.received_bytes for pair, flow in flows.items()}
    time.sleep(seconds)
    after, took = {pair: flow.received_bytes for pair, flow in flows.items()}, time.monotonic() - began
    return {pair: (after[pair] - before[pair]) / took for pair in flows}


@dataclass(frozen=True)
class Delays:
    """What one pair's probes met: how many of the sent came, and after how long each."""

    num_sent: int
    delays_s: tuple[float, ...]

    @property
    def latency_s(self) -> float:
        """The median one-way delay; not a number where nothing came."""
        return statistics.median(self.delays_s) if self.delays_s else float("nan")

    @property
    def jitter_s(self) -> float:
        """The standard deviation of the delays."""
        return statistics.pstdev(self.delays_s) if self.delays_s else float("nan")

    @property
    def loss(self) -> float:
        """The share of probes that never came."""
        return 1 - len(self.delays_s) / self.num_sent


def one_way_delays(pairs: dict[Pair, str], num_probes: int, spacing_s: float, longest_s: float) -> dict[Pair, Delays]:
    """Send small datagrams along every pair and time each, one way; wait `longest_s` for the last."""
    order = list(pairs)
    with contextlib.ExitStack() as stack:
        receivers = {target: stack.enter_context(_udp(target)) for target in {target for _, target in order}}
        senders = {pair: stack.enter_context(_udp(pair[0])) for pair in order}
        for pair, sender in senders.items():
            sender.connect((pairs[pair], receivers[pair[1]].getsockname()[1]))
            sender.send(_PROBE.pack(len(order), 0.0))  # finds the receiver's hardware address; not counted
        came: list[list[float]] = [[] for _ in range(len(order) + 1)]
        stop = time.monotonic() + num_probes * spacing_s + longest_s + 0.1
        thread = threading.Thread(target=_collect, args=(list(receivers.values()), came, stop), daemon=True)
        thread.start()
        time.sleep(0.05)
        _send_probes([senders[pair] for pair in order], num_probes, spacing_s)
        thread.join()
    return {pair: Delays(num_probes, tuple(came[i])) for i, pair in enumerate(order)}


def _udp(worker: str) -> socket.socket:
    with in_namespace(worker):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", 0))
    sock.setblocking(False)
    return sock


def _send_probes(senders: Sequence[socket.socket], num_probes: int, spacing_s: float) -> None:
    """Send in turn and evenly, so that no probe waits for the processor behind another."""
    begin = time.monotonic()
    for k in range(num_probes * len(senders)):
        time.sleep(max(0.0, begin + k * spacing_s / len(senders) - time.monotonic()))
        i = k % len(senders)
        senders[i].send(_PROBE.pack(i, time.monotonic()))


def _collect(receivers: list[socket.socket], came: list[list[float]], stop: float) -> None:
    run_soon()
    while (left := stop - time.monotonic()) > 0:
        for sock in select.select(receivers, [], [], left)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    index, sent = _PROBE.unpack(sock.recv(64))
                    came[index].append(time.monotonic() - sent)
