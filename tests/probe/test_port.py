"""Real sockets over localhost."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from wantrain.probe.port import Port, Stream, UnreachableError, round_trips_s


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port("127.0.0.1")
    yield made
    made.close()


def received_within(port: Port, stream: int, num_bytes: int, seconds: float = 10.0) -> dict[int, int]:
    """Return what has come of a stream, once it is so much in all."""
    deadline = time.monotonic() + seconds
    while sum(port.received(stream).values()) < num_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    return port.received(stream)


def test_what_comes_is_counted_by_stream_and_source(port: Port) -> None:
    first, second = Stream(1, 7, {port.place: 2}, 5.0), Stream(2, 8, {port.place: 1}, 5.0)
    try:
        assert set(received_within(port, 1, 10**6)) == {7}
        assert set(received_within(port, 2, 10**6)) == {8}
        assert port.received(3) == {}
    finally:
        first.stop()
        second.stop()


def test_a_stopped_stream_sends_no_more(port: Port) -> None:
    stream = Stream(1, 0, {port.place: 1}, 5.0)
    assert received_within(port, 1, 10**6)
    stream.stop()
    time.sleep(0.3)  # what was in the receiver's buffer
    before = port.received(1)
    time.sleep(0.2)
    assert port.received(1) == before


def test_round_trips_are_timed_while_nothing_else_goes(port: Port) -> None:
    times = round_trips_s(port.place, 20, 0.001, 5.0)
    assert len(times) == 20
    assert 0 < sorted(times)[10] < 0.05


def test_a_visitor_that_says_nothing_or_too_little_harms_nobody(port: Port) -> None:
    with socket.create_connection(port.place) as silent, socket.create_connection(port.place) as rude:
        rude.sendall(b"GET")
        rude.close()
        assert len(round_trips_s(port.place, 3, 0.0, 5.0)) == 3
        silent.close()
    assert len(round_trips_s(port.place, 3, 0.0, 5.0)) == 3


def closed_place() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return ("127.0.0.1", server.getsockname()[1])


def test_an_unreachable_place_is_named() -> None:
    place = closed_place()
    said = rf"nobody answers at 127.0.0.1:{place[1]} \(connection refused\)"
    with pytest.raises(UnreachableError, match=said) as caught:
        round_trips_s(place, 1, 0.0, 1.0)
    assert caught.value.place == place
    with pytest.raises(UnreachableError, match=said):
        Stream(1, 0, {place: 3}, 1.0)


def test_a_peer_that_does_not_answer_is_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(UnreachableError, match="timed out"):
        round_trips_s(mute.getsockname(), 1, 0.0, 0.1)
