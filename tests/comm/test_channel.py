"""The contract that every kind of channel keeps."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wantrain.comm.channel import Channel
from wantrain.errors import ChannelError

MakePair = Callable[..., tuple[Channel, Channel]]
Both = Callable[..., tuple[object, object]]
CloseBoth = Callable[[Channel, Channel], None]
TIMEOUT_S = 30.0


def payload(num_bytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_payloads_arrive_whole_and_in_order(make_pair: MakePair) -> None:
    a, b = make_pair()
    sizes = [1, 0, 63, 10_000, 10_001, 1_000_003, 0, 7]
    for i, size in enumerate(sizes):
        a.send(payload(size, seed=i))
    for i, size in enumerate(sizes):
        assert torch.equal(b.recv(TIMEOUT_S, f"payload {i}"), payload(size, seed=i))


def test_both_ends_may_send_much_before_either_receives(make_pair: MakePair) -> None:
    a, b = make_pair()
    sendings = [end.send(payload(2_000_000, seed=i)) for i in range(10) for end in (a, b)]
    for i in range(10):
        assert torch.equal(a.recv(TIMEOUT_S, "x"), payload(2_000_000, seed=i))
        assert torch.equal(b.recv(TIMEOUT_S, "x"), payload(2_000_000, seed=i))
    for sending in sendings:
        sending.wait(TIMEOUT_S)


def test_payload_is_free_to_change_once_done(make_pair: MakePair) -> None:
    a, b = make_pair()
    own = payload(300_000)
    sending = a.send(own)
    sending.wait(TIMEOUT_S)
    assert sending.done
    own.zero_()
    assert torch.equal(b.recv(TIMEOUT_S, "x"), payload(300_000))


def test_received_payload_is_aligned_and_nobody_elses(make_pair: MakePair) -> None:
    a, b = make_pair()
    own = payload(1000)
    a.send(own)
    found = b.recv(TIMEOUT_S, "x")
    assert found.data_ptr() % 64 == 0
    found.zero_()
    assert torch.equal(own, payload(1000))


def test_late_payload_names_the_peer_and_what_was_awaited(make_pair: MakePair) -> None:
    _, b = make_pair()
    with pytest.raises(ChannelError, match=r"no payload from 'a' within 0.05 s; awaited 2F3 of step 17"):
        b.recv(0.05, "2F3 of step 17")


def test_channel_works_on_after_a_time_out(make_pair: MakePair) -> None:
    a, b = make_pair()
    with pytest.raises(ChannelError, match="no payload"):
        b.recv(0.01, "x")
    a.send(payload(99))
    assert torch.equal(b.recv(TIMEOUT_S, "x"), payload(99))


def test_ready_says_whether_recv_would_wait(make_pair: MakePair) -> None:
    a, b = make_pair()
    assert not b.ready()
    a.send(payload(9))
    deadline_s = time.monotonic() + TIMEOUT_S
    while not b.ready() and time.monotonic() < deadline_s:
        threading.Event().wait(0.001)
    assert b.ready()
    b.recv(0, "x")
    assert not b.ready()


def test_events_and_statistics_count_every_payload(make_pair: MakePair) -> None:
    events: list[tuple[int, float, float, int]] = []
    a, b = make_pair(on_event=lambda *event: events.append(event))
    before_s = time.monotonic()
    for size in (5, 70_000):
        a.send(payload(size)).wait(TIMEOUT_S)
        b.recv(TIMEOUT_S, "x")
    assert [(index, size) for index, _, _, size in events] == [(0, 5), (1, 70_000)]
    assert all(before_s <= start_s <= end_s <= time.monotonic() for _, start_s, end_s, _ in events)
    assert a.stats.payload_bytes_sent == b.stats.payload_bytes_received == 70_005
    assert a.stats.wire_bytes_sent == b.stats.wire_bytes_received >= 70_005
    assert 0 < a.stats.busy_s < TIMEOUT_S


def test_close_lets_what_was_sent_arrive(make_pair: MakePair, both: Both) -> None:
    a, b = make_pair()
    a.send(payload(5_000_000))

    def take() -> None:
        assert torch.equal(b.recv(TIMEOUT_S, "x"), payload(5_000_000))
        b.close(TIMEOUT_S)

    both(lambda: a.close(TIMEOUT_S), take)


def test_recv_ends_at_once_when_the_peer_closes(make_pair: MakePair, both: Both) -> None:
    a, b = make_pair()

    def wait_in_vain() -> None:
        with pytest.raises(ChannelError, match="closed; awaited 1B0"):
            b.recv(TIMEOUT_S, "1B0")
        b.close(TIMEOUT_S)

    start_s = time.monotonic()
    both(lambda: a.close(TIMEOUT_S), wait_in_vain)
    assert time.monotonic() - start_s < TIMEOUT_S / 2


def test_close_without_the_peer_says_so(make_pair: MakePair) -> None:
    a, _ = make_pair()
    with pytest.raises(ChannelError, match=r"'b' did not close its end within 0.05 s"):
        a.close(0.05)


def test_closing_leaves_no_thread(make_pair: MakePair, close_both: CloseBoth) -> None:
    before = threading.active_count()
    a, b = make_pair()
    a.send(payload(100_000))
    b.send(payload(100_000))
    close_both(a, b)
    assert threading.active_count() <= before


def test_closed_channel_takes_nothing(make_pair: MakePair, close_both: CloseBoth) -> None:
    a, b = make_pair()
    close_both(a, b)
    with pytest.raises(ChannelError, match="closed"):
        a.send(payload(1))
    with pytest.raises(ChannelError, match="closed; awaited x"):
        a.recv(1, "x")


def test_wrong_payload_is_refused(make_pair: MakePair) -> None:
    a, _ = make_pair()
    with pytest.raises(ValueError, match="uint8"):
        a.send(torch.ones(3))
