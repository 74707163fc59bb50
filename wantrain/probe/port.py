"""The packets of a measurement: what one worker echoes, receives, counts and sends.

One thread with a selector receives everything, another sends: a process with 50 connections then costs what one with
two does, and eight such processes share a small machine. A connection begins with 12 bytes that say what it is:

    kind     "e": what comes is sent back        "s": what comes is counted and dropped
    stream   the number of the measurement
    source   the rank that sends

A stream is ended by resetting its connections, so that nothing queued in them disturbs the next one.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from wantrain.errors import ChannelError

_HELLO = struct.Struct("<4sii")
_ECHO, _SINK = b"echo", b"sink"
_PING_BYTES = 16

_SEND_BYTES = 1 << 18
"""Chosen: large enough that the interpreter costs nothing beside the copy, small beside any buffer."""

_LOOK_S = 0.2
"""Chosen: how soon a loop without traffic notices that it should end."""

_NUM_CONNECTING = 32
"""Chosen: connections of a worker that are opened at the same time; each takes a round trip."""

Place = tuple[str, int]


class UnreachableError(ChannelError):
    """Nobody answers at a place."""

    def __init__(self, place: Place, caught: OSError) -> None:
        self.place = place
        self.reason = (caught.strerror or str(caught)).lower()
        super().__init__(f"nobody answers at {place[0]}:{place[1]} ({self.reason})")


class Port:
    """A listening port that echoes and counts; `received(stream)` says what has come from whom."""

    def __init__(self, host: str) -> None:
        """Listen at `host`, on a port of the system's choice; Ctrl-C or `close` ends it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.place: Place = (host, self._listener.getsockname()[1])
        self._received: Counter[tuple[int, int]] = Counter()
        self._buffer = memoryview(bytearray(4 * _SEND_BYTES))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, _Incoming())
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def received(self, stream: int) -> dict[int, int]:
        """Return the bytes that have come in a stream, by the rank that sent them."""
        return {source: count for (one, source), count in list(self._received.items()) if one == stream}

    def close(self) -> None:
        """Stop listening and drop every connection."""
        self._is_open = False
        self._thread.join()
        _close_all(self._selector)

    def _run(self) -> None:
        while self._is_open:
            for key, _ in self._selector.select(_LOOK_S):
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.fileobj, key.data)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection, selectors.EVENT_READ, _Incoming())

    def _read(self, connection: socket.socket, incoming: _Incoming) -> None:
        wanted = self._buffer if incoming.is_known else self._buffer[: incoming.num_missing]
        try:
            num_bytes = connection.recv_into(wanted)
            if incoming.kind == _ECHO:
                connection.send(wanted[:num_bytes])
        except ConnectionError:
            num_bytes = 0
        if not num_bytes:
            self._selector.unregister(connection)
            connection.close()
        elif not incoming.is_known:
            incoming.hello += bytes(wanted[:num_bytes])
        elif incoming.kind == _SINK:
            self._received[incoming.key] += num_bytes


class _Incoming:
    """What is known of a connection that somebody opened."""

    def __init__(self) -> None:
        self.hello = b""

    @property
    def num_missing(self) -> int:
        return _HELLO.size - len(self.hello)

    @property
    def is_known(self) -> bool:
        return not self.num_missing

    @property
    def kind(self) -> bytes:
        return self.hello[:4] if self.is_known else b""

    @property
    def key(self) -> tuple[int, int]:
        _, stream, source = _HELLO.unpack(self.hello)
        return stream, source


class Stream:
    """Connections to some workers that are kept full from one thread until the stream is stopped."""

    def __init__(self, number: int, source: int, targets: Mapping[Place, int], timeout_s: float) -> None:
        """Open so many connections to each place; raise UnreachableError where one can't be."""
        self._selector = selectors.DefaultSelector()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        places = [place for place, num_connections in targets.items() for _ in range(num_connections)]
        with ThreadPoolExecutor(min(_NUM_CONNECTING, len(places))) as pool:
            opened = list(pool.map(lambda place: _try_to_open(place, timeout_s), places))
        failure = next((one for one in opened if isinstance(one, UnreachableError)), None)
        for one in opened:
            if isinstance(one, socket.socket):
                one.sendall(_HELLO.pack(_SINK, number, source))
                one.setblocking(False)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, see above
                self._selector.register(one, selectors.EVENT_WRITE)
        self._thread.start()
        if failure is not None:
            self.stop()
            raise failure

    def stop(self) -> None:
        """Reset all connections."""
        self._is_open = False
        self._thread.join()
        _close_all(self._selector)

    def _run(self) -> None:
        block = memoryview(os.urandom(_SEND_BYTES))
        while self._is_open:
            for key, _ in self._selector.select(_LOOK_S):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    key.fileobj.send(block)
                except BlockingIOError:
                    continue
                except ConnectionError:  # the other end has gone; whoever counts there will say so
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()


def round_trips_s(place: Place, num_pings: int, spacing_s: float, timeout_s: float) -> list[float]:
    """Return how long each of some small messages took there and back; raise UnreachableError if nobody answers."""
    try:
        with socket.create_connection(place, timeout=timeout_s) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_HELLO.pack(_ECHO, 0, 0))
            return [_ping(connection, spacing_s) for _ in range(num_pings)]
    except OSError as caught:
        raise UnreachableError(place, caught) from None


def _ping(connection: socket.socket, spacing_s: float) -> float:
    time.sleep(spacing_s)
    began = time.perf_counter()
    connection.sendall(bytes(_PING_BYTES))
    missing = _PING_BYTES
    while missing:
        got = len(connection.recv(missing))
        if not got:
            raise ConnectionResetError("closed by the other end")
        missing -= got
    return time.perf_counter() - began


def _try_to_open(place: Place, timeout_s: float) -> socket.socket | UnreachableError:
    try:
        return socket.create_connection(place, timeout=timeout_s)
    except OSError as caught:
        return UnreachableError(place, caught)


def _close_all(selector: selectors.BaseSelector) -> None:
    for key in list(selector.get_map().values()):
        _close(key.fileobj)
    selector.close()


def _close(connection: object) -> None:
    assert isinstance(connection, socket.socket)
    connection.close()
