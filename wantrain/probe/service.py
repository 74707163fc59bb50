"""What every worker of a measurement does: carry out the coordinator's commands, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from wantrain.errors import WantrainError
from wantrain.probe.control import Line, Message, hear
from wantrain.probe.port import Place, Port, Stream, UnreachableError, round_trips_s

PING_SPACING_S = 0.01
"""Chosen: so long a message has the path to itself where round trips are short."""

_NUM_PINGED = 64
"""Chosen: workers that are pinged at the same time; on a path nothing else is under way."""


class Service:
    """One worker's commands; `compute` measures what it computes with, where that is asked for."""

    def __init__(
        self, rank: int, port: Port, peers: dict[int, tuple[str, Place]], timeout_s: float,
        compute: Callable[[], Message],
    ) -> None:  # fmt: skip
        self._rank, self._port, self._peers, self._timeout_s = rank, port, peers, timeout_s
        self._streams: dict[int, Stream] = {}
        self._commands: dict[str, Callable[[Message], Message]] = {
            "ping": self._ping,
            "send": self._send,
            "stop": self._stop,
            "count": self._count,
            "compute": lambda _: compute(),
        }

    def run(self, line: Line) -> None:
        """Serve until the coordinator ends it; raise ChannelError where it ends badly."""
        try:
            while (message := hear(line, None)) is not None:
                line.send(self._reply(message))
        finally:
            for stream in self._streams.values():
                stream.stop()

    def _reply(self, message: Message) -> Message:
        try:
            return self._commands[message["do"]](message)
        except UnreachableError as caught:
            name = next(name for name, place in self._peers.values() if place == caught.place)
            host, port = caught.place
            return {
                "error": f"can't reach worker '{name}' at {host}:{port} ({caught.reason}); open its ports to the others"
            }
        except WantrainError as caught:
            return {"error": f"can't measure itself ({caught})"}

    def _ping(self, message: Message) -> Message:
        places = [self._peers[rank][1] for rank in message["ranks"]]

        def measure(place: Place) -> list[float]:
            return round_trips_s(place, message["count"], PING_SPACING_S, self._timeout_s)

        with ThreadPoolExecutor(_NUM_PINGED) as pool:
            return {"round_trips_s": list(pool.map(measure, places))}

    def _send(self, message: Message) -> Message:
        targets = {self._peers[rank][1]: num_connections for rank, num_connections in message["to"]}
        self._streams[message["stream"]] = Stream(message["stream"], self._rank, targets, self._timeout_s)
        return {}

    def _stop(self, message: Message) -> Message:
        self._streams.pop(message["stream"]).stop()
        return {}

    def _count(self, message: Message) -> Message:
        """Say what has come by now, by this worker's own clock."""
        received = self._port.received(message["stream"])
        return {"now_s": time.monotonic(), "received": [[rank, count] for rank, count in received.items()]}
