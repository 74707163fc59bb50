"""A worker's commands, over real sockets to itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from wantrain.errors import ChannelError, ConfigError
from wantrain.probe.control import Line, Message
from wantrain.probe.port import Port
from wantrain.probe.service import Service

Ask = Callable[[Message], Message]


@pytest.fixture
def served() -> Iterator[tuple[Ask, list[BaseException]]]:
    """Serve rank 0, whose peer 1 is itself and whose peer 2 is not there; what `run` raises is kept."""
    port, raised = Port("127.0.0.1"), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours, theirs = Line(socket.create_connection(server.getsockname())), Line(server.accept()[0])
        gone = ("127.0.0.1", server.getsockname()[1])

    def compute() -> Message:
        raise ConfigError("no such device")

    service = Service(0, port, {1: ("self", port.place), 2: ("gone", gone)}, 5.0, compute)

    def run() -> None:
        try:
            service.run(theirs)
        except ChannelError as caught:
            raised.append(caught)

    def ask(message: Message) -> Message:
        ours.send(message)
        return {} if message["do"] == "end" else ours.receive(10.0)

    thread = threading.Thread(target=run)
    thread.start()
    yield ask, raised
    ours.close()
    thread.join()
    theirs.close()
    port.close()


def test_pings_go_to_the_ranks_that_are_named(served: tuple[Ask, list[BaseException]]) -> None:
    (times,) = served[0]({"do": "ping", "ranks": [1], "count": 4})["round_trips_s"]
    assert len(times) == 4
    assert all(0 < one < 5 for one in times)


def test_a_stream_is_counted_until_it_is_stopped(served: tuple[Ask, list[BaseException]]) -> None:
    ask, _ = served
    assert ask({"do": "send", "stream": 3, "to": [[1, 2]]}) == {}
    first = ask({"do": "count", "stream": 3})
    time.sleep(0.3)
    later = ask({"do": "count", "stream": 3})
    assert later["now_s"] > first["now_s"]
    ((source, num_bytes),) = later["received"]
    assert source == 0
    assert num_bytes > 10**6
    assert ask({"do": "stop", "stream": 3}) == {}


def test_who_cannot_be_reached_is_named(served: tuple[Ask, list[BaseException]]) -> None:
    ask, _ = served
    for message in ({"do": "ping", "ranks": [2], "count": 1}, {"do": "send", "stream": 1, "to": [[2, 1]]}):
        assert ask(message)["error"].startswith("can't reach worker 'gone' at 127.0.0.1:")


def test_what_a_worker_cannot_measure_is_an_answer(served: tuple[Ask, list[BaseException]]) -> None:
    assert served[0]({"do": "compute"}) == {"error": "can't measure itself (no such device)"}


def test_a_bad_end_is_everybodys_error(served: tuple[Ask, list[BaseException]]) -> None:
    ask, raised = served
    ask({"do": "end", "reason": "lost worker 'oslo'"})
    deadline = time.monotonic() + 5
    while not raised and time.monotonic() < deadline:
        time.sleep(0.01)
    assert str(raised[0]) == "lost worker 'oslo'"
