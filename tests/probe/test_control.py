from __future__ import annotations

import socket
import threading

import pytest
from networks import free_port

from wantrain.errors import ChannelError, ConfigError
from wantrain.probe.control import Line, Meeting, Workers, meet


@pytest.fixture
def ends() -> tuple[Line, Line]:
    """Return the two ends of a line."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return Line(one), Line(server.accept()[0])


def test_messages_arrive_whole_and_in_order(ends: tuple[Line, Line]) -> None:
    there, here = ends
    there.send({"do": "count", "stream": 1})
    there.send({"text": "two\nlines"})
    assert here.receive(5.0) == {"do": "count", "stream": 1}
    assert here.receive(5.0) == {"text": "two\nlines"}
    assert here.own_host == "127.0.0.1"
    there.close()
    with pytest.raises(ChannelError, match="the connection has ended"):
        here.receive(5.0)
    here.close()


def test_silence_and_nonsense_are_errors(ends: tuple[Line, Line]) -> None:
    there, here = ends
    with pytest.raises(ChannelError, match=r"no answer within 0.05 s"):
        here.receive(0.05)
    there._connection.sendall(b"hello\n")
    with pytest.raises(ChannelError, match="no JSON"):
        Line(here._connection).receive(5.0)
    there.close()
    here.close()


def test_all_meet_in_the_order_of_their_ranks() -> None:
    meeting = Meeting(port := free_port())
    lines = [meet("127.0.0.1", port, 5.0) for _ in range(3)]
    for rank, line in zip((2, 0, 1), lines, strict=True):
        line.send({"rank": rank, "name": f"w-{rank}"})
    came = meeting.gather(3, 5.0)
    assert [greeting["name"] for _, greeting in came] == ["w-0", "w-1", "w-2"]
    for line in (*lines, *(line for line, _ in came)):
        line.close()
    meeting.close()


def test_who_does_not_come_is_named() -> None:
    meeting = Meeting(port := free_port())
    line = meet("127.0.0.1", port, 5.0)
    line.send({"rank": 1})
    with pytest.raises(ChannelError, match=r"not all workers came within 0.2 s \(rank 0, 2 did not\)"):
        meeting.gather(3, 0.2)
    line.close()
    meeting.close()


def test_a_rank_that_is_claimed_twice_is_refused() -> None:
    meeting = Meeting(port := free_port())
    lines = [meet("127.0.0.1", port, 5.0) for _ in range(2)]
    for line in lines:
        line.send({"rank": 0})
    with pytest.raises(ConfigError, match="two processes claim rank 0"):
        meeting.gather(2, 5.0)
    for line in lines:
        line.close()
    meeting.close()


def test_a_taken_port_and_an_absent_rank_0_are_said() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(ConfigError, match="choose another MASTER_PORT"):
        Meeting(taken.getsockname()[1])
    port = free_port()
    with pytest.raises(ChannelError, match=rf"can't meet at 127.0.0.1:{port} \(connection refused\); is rank 0 run"):
        meet("127.0.0.1", port, 0.1)


def test_a_worker_that_fails_or_goes_is_named(ends: tuple[Line, Line]) -> None:
    there, here = ends
    workers = Workers([here], ["oslo"], 5.0)

    def answer() -> None:
        there.receive(5.0)
        there.send({"error": "can't reach worker 'rome'"})
        there.receive(5.0)
        there.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(ChannelError, match="worker 'oslo' can't reach worker 'rome'"):
        workers.ask({0: {"do": "ping"}})
    with pytest.raises(ChannelError, match=r"lost worker 'oslo' \(the connection has ended\); is it running\?"):
        workers.ask({0: {"do": "ping"}})
    thread.join()
    here.close()
