"""Whether two hosts reach each other, and what lies between: ports, round trip, path MTU, clocks.

One host answers (`Answerer`: a TCP and a UDP socket on the same port, which send back what comes, with this host's
time), the other asks. Only sockets; no root.

Clock: as NTP does it (D. L. Mills, "Internet Time Synchronization", 1991): the other's time was read half a round trip
after the question left, give or take that half. Path MTU: datagrams that may not be fragmented, ever larger ones that
still come back.
"""

from __future__ import annotations

import select
import socket
import statistics
import struct
import threading
import time
from typing import NamedTuple

_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3
_IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_PROBE = 23, 3
"""linux/in.h, linux/in6.h: don't fragment, and don't believe in a path MTU known before."""

_HEADERS_BYTES = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""IP's and UDP's."""

_MIN_MTU, _MAX_MTU = 576, 9216
_CLOCK = struct.Struct("!d")
_ASKED_BYTES = 8
_ROUNDS = 9
_TRIES = 3


class Answerer:
    """Answers on a port of an address until it is closed; `port` 0 lets the kernel choose."""

    def __init__(self, address: str, port: int = 0) -> None:
        family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((address, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._datagrams = socket.socket(family, socket.SOCK_DGRAM)
        self._datagrams.bind((address, self.port))
        self._streams: list[socket.socket] = []
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._wake.close()
        self._thread.join()
        for one in (self._listener, self._datagrams, self._woken, *self._streams):
            one.close()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._listener, self._datagrams, self._woken, *self._streams], [], [])
            if self._woken in ready:
                return
            if self._listener in ready:
                self._streams.append(self._listener.accept()[0])
            if self._datagrams in ready:
                self._answer_datagram()
            for stream in [one for one in self._streams if one in ready]:
                self._answer(stream)

    def _answer(self, stream: socket.socket) -> None:
        try:
            asked = stream.recv(_ASKED_BYTES)
            if asked:
                stream.sendall(_CLOCK.pack(time.time()))
                return
        except OSError:
            pass  # whoever asked is gone
        self._streams.remove(stream)
        stream.close()

    def _answer_datagram(self) -> None:
        try:
            data, asker = self._datagrams.recvfrom(_MAX_MTU)
            self._datagrams.sendto(struct.pack("!H", len(data)), asker)  # small, so that only one way is judged
        except OSError:
            pass


class Reached(NamedTuple):
    """What lies between this host and another's port."""

    round_trip_s: float
    """Median."""
    clock_ahead_s: float
    """How far the other's clock is ahead of this one's, give or take half a round trip."""


def reach(address: str, port: int, timeout_s: float) -> Reached:
    """Connect to an `Answerer` and ask a few times; raise OSError where it can't be reached."""
    trips = []
    with socket.create_connection((address, port), timeout=timeout_s) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ROUNDS):
            began, began_s = time.time(), time.perf_counter()
            stream.sendall(bytes(_ASKED_BYTES))
            answer = stream.recv(_CLOCK.size, socket.MSG_WAITALL)
            if len(answer) < _CLOCK.size:
                raise ConnectionResetError("connection closed by what listens there")
            trip_s = time.perf_counter() - began_s
            trips.append((trip_s, _CLOCK.unpack(answer)[0] - (began + trip_s / 2)))
    _, ahead_s = min(trips)  # the quickest trip knows best
    return Reached(statistics.median(trip_s for trip_s, _ in trips), ahead_s)


def path_mtu(address: str, port: int, wait_s: float) -> int | None:
    """Return the greatest IP packet that gets to an `Answerer` whole; None where no datagram comes back at all."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_PROBE)
        else:
            probe.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        probe.connect(place)
        headers = _HEADERS_BYTES[family]
        if not _comes_back(probe, _MIN_MTU - headers, wait_s):
            return None
        low, high = _MIN_MTU, _MAX_MTU
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _comes_back(probe, middle - headers, wait_s) else (low, middle - 1)
        return low


def _comes_back(probe: socket.socket, size: int, wait_s: float) -> bool:
    """Send a datagram of `size` bytes, a few times if need be; say whether its arrival was answered."""
    for _ in range(_TRIES):
        try:
            probe.send(bytes(size))
        except OSError:  # larger than this host's own interface takes
            return False
        deadline_s = time.monotonic() + wait_s
        while (left_s := deadline_s - time.monotonic()) > 0 and select.select([probe], [], [], left_s)[0]:
            try:
                if struct.unpack("!H", probe.recv(2))[0] == size:
                    return True
            except OSError:  # an ICMP refusal of an earlier one
                break
    return False
