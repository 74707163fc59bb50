"""How the workers of a measurement meet and are told what to do: lines of JSON over one connection each.

    rank 0                       every rank, rank 0 too
    ┌─────────────┐   commands   ┌─────────────────────────────┐
    │ coordinator ├─────────────►│ serve: ping, send, stop,    │
    │ (measure)   │◄─────────────┤        count, compute, end  │
    └─────────────┘   replies    └─────────────────────────────┘

Neither torch nor its store is needed, so that eight workers start in a second on a small machine. The coordinator
listens one port above MASTER_PORT, since torchrun's own store holds that one. Every wait has an end: a worker that does
not come, does not answer or has gone is named in one line, at every rank.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wantrain.errors import ChannelError, ConfigError

Message = dict[str, Any]

INTERRUPTED = "the measurement was interrupted"

_RETRY_S = 0.2
_MOST_LINE_BYTES = 1 << 20
_GREETING_WITHIN_S = 5.0
"""Chosen: whoever belongs here says who it is at once."""

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
"""Chosen: a host that vanished without a word is given up after half a minute, however long a rank has to wait."""


class Line:
    """A connection that carries messages, one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection = connection
        self._file = connection.makefile("rb")

    @property
    def own_host(self) -> str:
        """This end's address."""
        return str(self._connection.getsockname()[0])

    def send(self, message: Message) -> None:
        """Send a message; raise ChannelError where the other end has gone."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as caught:
            raise _gone(caught) from None

    def receive(self, timeout_s: float | None) -> Message:
        """Return the next message; raise ChannelError where none comes in time, or the other end has gone."""
        self._connection.settimeout(timeout_s)
        try:
            line = self._file.readline(_MOST_LINE_BYTES)
        except TimeoutError:
            raise ChannelError(f"no answer within {timeout_s:g} s") from None
        except OSError as caught:
            raise _gone(caught) from None
        if not line.endswith(b"\n"):
            raise ChannelError("the connection has ended")
        try:
            message = json.loads(line)
        except ValueError:
            raise ChannelError("no JSON") from None
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """End the connection."""
        self._file.close()
        self._connection.close()


def _gone(caught: OSError) -> ChannelError:
    return ChannelError((caught.strerror or str(caught)).lower())


class Meeting:
    """Rank 0's end: where the others come to."""

    def __init__(self, port: int) -> None:
        """Listen at all addresses of this host; raise ConfigError where the port is taken."""
        try:
            self._listener = socket.create_server(("", port), backlog=1024)
        except OSError as caught:
            reason = (caught.strerror or str(caught)).lower()
            raise ConfigError(f"can't listen at port {port} ({reason}); choose another MASTER_PORT") from None

    def gather(self, world_size: int, timeout_s: float) -> list[tuple[Line, Message]]:
        """Return the line and the greeting of every rank, in order; raise ChannelError for those that don't come."""
        deadline, came = time.monotonic() + timeout_s, dict[int, tuple[Line, Message]]()
        try:
            while len(came) < world_size:
                self._admit(came, world_size, deadline)
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in range(world_size) if rank not in came)
            reason = f"not all workers came within {timeout_s:g} s (rank {missing} did not); are all running?"
            dismiss((line for line, _ in came.values()), reason)
            raise ChannelError(reason) from None
        except BaseException as caught:
            dismiss((line for line, _ in came.values()), str(caught) or INTERRUPTED)
            raise
        return [came[rank] for rank in range(world_size)]

    def _admit(self, came: dict[int, tuple[Line, Message]], world_size: int, deadline: float) -> None:
        """Take the next to come; somebody else's connection is dropped, and whoever lacks will be missed."""
        self._listener.settimeout(max(0.01, deadline - time.monotonic()))
        line, greeting = Line(self._listener.accept()[0]), Message()
        with contextlib.suppress(ChannelError):
            greeting = line.receive(_GREETING_WITHIN_S)
        rank = greeting.get("rank")
        if rank in came or not isinstance(rank, int) or not 0 <= rank < world_size:
            line.close()
        else:
            came[rank] = (line, greeting)
            return
        if rank in came:
            raise ConfigError(f"two processes claim rank {rank}; start them with torchrun")

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def meet(host: str, port: int, timeout_s: float) -> Line:
    """Return a line to rank 0; raise ChannelError where it doesn't come."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return Line(socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())))
        except OSError as caught:
            if time.monotonic() > deadline:
                reason = (caught.strerror or str(caught)).lower()
                raise ChannelError(f"can't meet at {host}:{port} ({reason}); is rank 0 running?") from None
            time.sleep(_RETRY_S)


class Workers:
    """The coordinator's end of all lines: who takes part, and what they are asked."""

    def __init__(self, lines: Sequence[Line], names: Sequence[str], timeout_s: float) -> None:
        self._lines, self.names, self._timeout_s = lines, names, timeout_s

    def ask(self, commands: Mapping[int, Message], timeout_s: float | None = None) -> dict[int, Message]:
        """Send each rank its command, then return all replies; raise ChannelError, naming the worker, for a failure."""
        for rank, command in commands.items():
            self._named(rank, self._lines[rank].send, command)
        within_s = self._timeout_s if timeout_s is None else timeout_s
        replies = {rank: self._named(rank, self._lines[rank].receive, within_s) for rank in commands}
        for rank, reply in replies.items():
            if "error" in reply:
                raise ChannelError(f"worker '{self.names[rank]}' {reply['error']}")
        return replies

    def _named(self, rank: int, call: Any, argument: Any) -> Any:
        try:
            return call(argument)
        except ChannelError as caught:
            raise ChannelError(f"lost worker '{self.names[rank]}' ({caught}); is it running?") from None


def dismiss(lines: Iterable[Line], reason: str = "") -> None:
    """Tell everybody that it is over, and why if it went wrong; end their lines."""
    for line in lines:
        with contextlib.suppress(ChannelError):
            line.send({"do": "end", "reason": reason})
        line.close()


def hear(line: Line, timeout_s: float | None) -> Message | None:
    """Return the coordinator's next command, None when it is over; raise ChannelError where that is a bad end."""
    try:
        message = line.receive(timeout_s)
    except ChannelError as caught:
        raise ChannelError(f"lost rank 0 ({caught}); is it running?") from None
    if message["do"] != "end":
        return message
    if message["reason"]:
        raise ChannelError(message["reason"])
    return None
