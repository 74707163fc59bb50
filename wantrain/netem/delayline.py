"""Hold every packet that a worker receives for its link's latency: the delay of kernels without sch_netem.

One process per receiving worker, in that worker's network namespace: `python -m wantrain.netem.delayline 3:0.02 …`
holds the packets of NFQUEUE 3 for 20 ms. Packets stay in the kernel; only their ids cross, about a hundred bytes each:

    kernel ──id──► drain: (due, id) to the end of its queue ──due──► verdict "accept up to this id" ──► kernel

A queue has one source and one delay, so ids fall due in their order and one verdict releases many. The work per packet
is one recv and one append, which must keep up with bursts: without root a netlink socket holds about 4 MB at most, and
what does not fit is a lost packet. TCP's large packets stay whole (NFQA_CFG_F_GSO), which saves 40 ids of every 41.
Waking up costs more than all this, so a queue that got packets rests for a turn, a small share of its delay, before
it is looked at again, and what falls due within half a turn goes together. A packet that comes alone waits exactly its
time, one in a stream up to a turn less or half a turn more (16 workers at a dilation of 20: the lines took 44 % of all
processor time before).

The process sleeps nearly always and asks the scheduler for short turns, so it runs soon after it wakes beside busy
workers too (eight busy loops on two cores: median 0.3 ms late, without the short turns 0.7; measured on Linux 6.18).
Packets are stamped before they are held: where a
program reads the kernel's receive time, as `ping` does, the last hop's delay is not in it; `ping -U` shows it all.

Message formats: linux/netfilter/nfnetlink.h and nfnetlink_queue.h.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from wantrain.errors import EmulationError

_NETLINK_NETFILTER, _SOL_NETLINK, _NETLINK_NO_ENOBUFS, _SO_RCVBUFFORCE = 12, 270, 5, 33
_SUBSYSTEM_QUEUE, _MSG_CONFIG, _MSG_VERDICT_BATCH = 3, 2, 3
_REQUEST, _ACK = 1, 4
_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_CMD_BIND, _COPY_META, _F_GSO, _ACCEPT, _VERDICT_HDR = 1, 1, 1 << 2, 1, 2
_PACKET_ID_AT = 24
"""Derived: after the netlink header (16 bytes), nfgenmsg (4) and the first attribute's header (4)."""

_PR_SET_TIMERSLACK = 29
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
_TURN_NS = 100_000
"""Chosen: the least that Linux grants (since 6.12; older kernels ignore it); a task with short turns is served soon."""

_MOST_HELD = 1 << 18
"""Packets that a queue may hold: 250 ms at 1 Gbit/s in frames of 119 bytes; a full queue drops."""

_BATCH = 512
"""Chosen: ids taken from one queue before due ones are released elsewhere, well below a millisecond of work."""

_TURNS = 32
"""Chosen: turns in a queue's delay; what a stream's packets wait is off by a 32nd of it at most."""

_LONGEST_TURN_S = 20e-3
"""Chosen: at 1 Gbit/s in frames of 1514 bytes 1650 ids come in it, which a socket holds without root."""

READY = "ready"
"""Announced on standard output once every queue is bound."""


class DelayQueue:
    """One NFQUEUE, bound; holds what comes for `delay_s`."""

    def __init__(self, number: int, delay_s: float) -> None:
        self.number, self.delay_s = number, delay_s
        self.turn_s = min(_LONGEST_TURN_S, delay_s / _TURNS)
        self.rests_until: float | None = None
        """When it is looked at again, whether or not anything has come; None: when something comes."""
        self._looked_s = 0.0
        self.socket = _netlink_socket()
        self._held: collections.deque[tuple[float, int]] = collections.deque()
        self._buffer = bytearray(8192)
        self._configure(_attribute(_CFG_CMD, struct.pack(">BBH", _CMD_BIND, 0, socket.AF_INET)))
        self._configure(_attribute(_CFG_PARAMS, struct.pack(">IB", 0, _COPY_META)))
        self._configure(_attribute(_CFG_QUEUE_MAXLEN, struct.pack(">I", _MOST_HELD)))
        flag = struct.pack(">I", _F_GSO)
        self._configure(_attribute(_CFG_FLAGS, flag) + _attribute(_CFG_MASK, flag))
        self.socket.setblocking(False)

    @property
    def next_s(self) -> float:
        """When there is something to do even if nothing comes; infinity for never."""
        due = self._held[0][0] if self._held else float("inf")
        return due if self.rests_until is None else min(due, self.rests_until)

    def drain(self, now: float) -> None:
        """Take note of every packet that has come; what came while the queue rested is put at the rest's middle."""
        buffer, receive, held = self._buffer, self.socket.recv_into, self._held
        packet_id = struct.Struct(">I").unpack_from
        since = now if self.rests_until is None else self._looked_s
        due, self._looked_s = (since + now) / 2 + self.delay_s, now
        for taken in range(_BATCH):
            try:
                receive(buffer)
            except BlockingIOError:
                self.rests_until = now + self.turn_s if taken else None
                return
            if buffer[5] == _SUBSYSTEM_QUEUE:
                held.append((due, packet_id(buffer, _PACKET_ID_AT)[0]))
            else:
                _raise_for(buffer)
        self.rests_until = now

    def release(self, now: float) -> None:
        """Let every packet go that is due, and with it what is due within half a turn."""
        held, last = self._held, None
        if not held or held[0][0] > now:
            return
        until = now + self.turn_s / 2
        while held and held[0][0] <= until:
            last = held.popleft()[1]
        self._send(_MSG_VERDICT_BATCH, _attribute(_VERDICT_HDR, struct.pack(">II", _ACCEPT, last)), _REQUEST)

    def _configure(self, attributes: bytes) -> None:
        self._send(_MSG_CONFIG, attributes, _REQUEST | _ACK)
        _raise_for(self.socket.recv(8192))

    def _send(self, kind: int, attributes: bytes, flags: int) -> None:
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, self.number) + attributes
        self.socket.send(struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM_QUEUE << 8 | kind, flags, 0, 0) + body)


def _netlink_socket() -> socket.socket:
    """Open a socket with the largest buffer that is allowed: a forced one only for root of the machine itself."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    sock.bind((0, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    return sock


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _raise_for(message: bytes | bytearray) -> None:
    """Raise what a netlink error message says; a verdict on packets that the kernel has dropped itself is no error."""
    code = -struct.unpack_from("=i", message, 16)[0]
    if code not in (0, errno.ENOENT):
        reason = os.strerror(code).lower()
        raise EmulationError(f"the kernel refuses a packet queue ({reason}); it needs nfnetlink_queue")


def run_soon() -> None:
    """Ask for exact timers and short turns on the processor for this thread; neither needs a privilege."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is not None:
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, 0, 0, _TURN_NS, 0, 0)
        libc.syscall(number, 0, attributes, 0)


def serve(queues: Sequence[DelayQueue]) -> NoReturn:
    """Delay packets until killed. `select` has microseconds where `poll` has milliseconds."""
    while True:
        by_socket = {queue.socket: queue for queue in queues if queue.rests_until is None}
        next_s = min(queue.next_s for queue in queues)
        timeout = None if next_s == float("inf") else max(0.0, next_s - time.monotonic())
        ready = select.select(by_socket, (), (), timeout)[0]
        now = time.monotonic()
        for one in ready:
            by_socket[one].drain(now)
        for queue in queues:
            if queue.rests_until is not None and queue.rests_until <= now:
                queue.drain(now)
            queue.release(now)


def main(argv: Sequence[str]) -> NoReturn:
    """Serve the queues given as NUMBER:SECONDS; announce readiness on standard output."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        queues = [DelayQueue(int(number), float(delay)) for number, delay in (one.split(":") for one in argv)]
    except EmulationError as caught:
        sys.exit(f"wantrain: {caught}")
    run_soon()
    gc.disable()  # nothing here makes a cycle, and a collection would be a late packet
    print(READY, flush=True)
    serve(queues)


if __name__ == "__main__":
    main(sys.argv[1:])
