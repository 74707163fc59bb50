"""Who goes first."""

import threading
import time

import torch

from wantrain.comm.channel import Sending
from wantrain.comm.sender import Outlet, Sender


def sending(num_bytes: int, index: int = 0) -> Sending:
    return Sending(index, torch.zeros(num_bytes, dtype=torch.uint8), "peer")


def taken(sender: Sender, outlet: Outlet) -> tuple[int, int, int] | None:
    chunk = sender.take(outlet, block=False)
    return None if chunk is None else (chunk.sending.index, chunk.offset, chunk.num_bytes)


def test_payloads_leave_in_chunks_one_after_the_other() -> None:
    sender = Sender()
    outlet = sender.open(0, chunk_bytes=100_000, num_connections=1)
    sender.submit(outlet, sending(150_000, 0))
    sender.submit(outlet, sending(10, 1))
    assert [taken(sender, outlet) for _ in range(4)] == [(0, 0, 100_000), (0, 100_000, 50_000), (1, 0, 10), None]


def test_small_payload_is_spread_over_all_connections() -> None:
    sender = Sender()
    outlet = sender.open(0, chunk_bytes=500_000, num_connections=3)
    sender.submit(outlet, sending(300_000))
    assert [taken(sender, outlet) for _ in range(3)] == [(0, 0, 100_000), (0, 100_000, 100_000), (0, 200_000, 100_000)]


def test_bound_holds_over_all_outlets() -> None:
    sender = Sender(max_bytes_under_way=150_000)
    one, two = (sender.open(0, 100_000, 1) for _ in range(2))
    sender.submit(one, sending(100_000, 1))
    sender.submit(two, sending(100_000, 2))
    assert taken(sender, one) == (1, 0, 100_000)
    assert taken(sender, two) is None
    sender.release(one, 100_000)
    assert taken(sender, two) == (2, 0, 100_000)


def test_chunk_above_the_bound_goes_alone() -> None:
    sender = Sender(max_bytes_under_way=10)
    outlet = sender.open(0, 100_000, 1)
    sender.submit(outlet, sending(100_000))
    assert taken(sender, outlet) == (0, 0, 100_000)


def test_under_a_bound_priority_goes_first_then_who_came_first() -> None:
    sender = Sender(max_bytes_under_way=1000)
    full, weights, first, second = (sender.open(priority, 1000, 1) for priority in (0, 1, 0, 0))
    sender.submit(full, sending(1000))
    assert taken(sender, full) is not None
    order: list[Outlet] = []

    def connection(outlet: Outlet) -> None:
        while (chunk := sender.take(outlet, block=True)) is not None:
            order.append(outlet)
            sender.release(outlet, chunk.num_bytes)

    for outlet in (weights, first, second):
        sender.submit(outlet, sending(1000))
    threads = [threading.Thread(target=connection, args=(outlet,), daemon=True) for outlet in (second, weights, first)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 30
    while not (weights.idle and first.idle and second.idle) and time.monotonic() < deadline_s:
        threading.Event().wait(0.001)
    sender.release(full, 1000)
    for outlet in (weights, first, second):
        sender.close(outlet)
    for thread in threads:
        thread.join()
    assert order == [first, second, weights]


def test_closed_outlet_is_drained_then_gives_none() -> None:
    sender = Sender()
    outlet = sender.open(0, 100_000, 1)
    sender.submit(outlet, sending(10))
    sender.close(outlet)
    assert taken(sender, outlet) == (0, 0, 10)
    assert sender.take(outlet, block=True) is None


def test_dropped_outlet_gives_its_room_back() -> None:
    sender = Sender(max_bytes_under_way=100_000)
    one, two = (sender.open(0, 100_000, 1) for _ in range(2))
    sender.submit(one, sending(200_000))
    assert taken(sender, one) == (0, 0, 100_000)
    sender.close(one, drop=True)
    sender.submit(two, sending(100_000))
    assert taken(sender, two) == (0, 0, 100_000)


def test_connections_take_turns_so_that_a_payload_spreads_evenly() -> None:
    sender, num_connections, rounds = Sender(), 4, 25
    outlet = sender.open(0, chunk_bytes=64 * 1024, num_connections=num_connections)
    counts = [0] * num_connections

    def carry(number: int) -> None:
        while (chunk := sender.take(outlet, block=True)) is not None:
            counts[number] += 1
            sender.release(outlet, chunk.num_bytes)

    threads = [threading.Thread(target=carry, args=(number,), daemon=True) for number in range(num_connections)]
    for thread in threads:
        thread.start()
    while len(outlet.idle) < num_connections:
        time.sleep(0.001)
    sender.submit(outlet, sending(rounds * num_connections * 64 * 1024))
    while sum(counts) < rounds * num_connections:
        time.sleep(0.001)
    sender.close(outlet)
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(counts) == rounds * num_connections
    assert max(counts) - min(counts) <= rounds // 5, counts


def test_all_who_wait_for_room_at_a_closed_outlet_end_once_the_last_chunk_is_taken() -> None:
    sender = Sender(max_bytes_under_way=1000)
    full, closed = (sender.open(0, 1000, 2) for _ in range(2))
    sender.submit(full, sending(1000))
    assert taken(sender, full) == (0, 0, 1000)
    sender.submit(closed, sending(1000))
    chunks: list[object] = []
    threads = [
        threading.Thread(target=lambda: chunks.append(sender.take(closed, block=True)), daemon=True) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    while len(closed.idle) < 2:
        time.sleep(0.001)
    sender.close(closed)
    sender.release(full, 1000)
    for thread in threads:
        thread.join(5)
    assert len(chunks) == 2
    assert chunks.count(None) == 1
