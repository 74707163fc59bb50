"""What only a channel over sockets can show: agreement on opening, and a peer that dies."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore, HashStore, Store

from wantrain.comm import pairs
from wantrain.comm.channel import Channel
from wantrain.comm.sender import Sender
from wantrain.comm.torch_channel import Opening, TorchChannel, open_channels
from wantrain.errors import ChannelError, ConfigError
from wantrain.wire import Transport

MakePair = Callable[..., tuple[Channel, Channel]]
Both = Callable[..., tuple[object, object]]
CloseBoth = Callable[[Channel, Channel], None]
TIMEOUT_S = 30.0


def open_end(store: Store, rank: int, transport: Transport | None = None, timeout_s: float = TIMEOUT_S) -> Channel:
    opening = Opening("pair", 1 - rank, "ba"[rank], Sender(), transport or Transport())
    (channel,) = open_channels(store, rank, [opening], timeout_s=timeout_s, address="127.0.0.1")
    return channel


def test_peer_that_does_not_come_is_named(store: HashStore) -> None:
    with pytest.raises(ChannelError, match=r"'b' did not come within 0.1 s"):
        open_end(store, 0, timeout_s=0.1)


def test_what_gloo_says_of_a_connection_that_it_cannot_begin_is_told(
    store: HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> object:
        raise RuntimeError("[somewhere:1] no more sockets. Advice")

    monkeypatch.setattr(pairs, "Pair", refuse)
    with pytest.raises(ChannelError, match=r"can't connect to 'b' \(no more sockets\); do the workers reach"):
        open_end(store, 0)


def test_ends_that_differ_in_transport_are_refused(store: HashStore, both: Both) -> None:
    def refused(rank: int, transport: Transport) -> None:
        with pytest.raises(ConfigError, match="asks for another transport"):
            open_end(store, rank, transport)

    both(lambda: refused(0, Transport(2)), lambda: refused(1, Transport(3)))


def test_many_channels_open_at_once_in_any_order(store: HashStore, both: Both, close_both: CloseBoth) -> None:
    def ends(rank: int, names: list[str]) -> dict[str, TorchChannel]:
        asked = [Opening(name, 1 - rank, "ba"[rank], Sender(), Transport(num_connections=2)) for name in names]
        opened = open_channels(store, rank, asked, timeout_s=TIMEOUT_S, address="127.0.0.1")
        return dict(zip(names, opened, strict=True))

    names = [f"channel{i}" for i in range(6)]
    firsts, seconds = both(lambda: ends(0, names), lambda: ends(1, names[::-1]))
    assert isinstance(firsts, dict)
    assert isinstance(seconds, dict)
    for i, name in enumerate(names):
        firsts[name].send(torch.ones(5 + i, dtype=torch.uint8))
        assert seconds[name].recv(TIMEOUT_S, "x").numel() == 5 + i
        close_both(firsts[name], seconds[name])


def test_three_that_connect_to_each_other_wait_for_each_other_alone(store: HashStore) -> None:
    """Every one opens channels to both others in one call; who comes late is waited for."""

    def member(rank: int) -> list[TorchChannel]:
        time.sleep(0.3 * rank)
        peers = [peer for peer in range(3) if peer != rank]
        asked = [Opening(f"{min(rank, peer)}-{max(rank, peer)}", peer, f"rank {peer}", Sender()) for peer in peers]
        return open_channels(store, rank, asked, timeout_s=TIMEOUT_S, address="127.0.0.1")

    with ThreadPoolExecutor(6) as pool:
        first, second, third = pool.map(member, range(3))
        first[1].send(torch.ones(7, dtype=torch.uint8))
        assert third[0].recv(TIMEOUT_S, "x").numel() == 7
        list(pool.map(lambda channel: channel.close(TIMEOUT_S), [*first, *second, *third]))


def test_a_channel_that_only_one_end_opens_is_refused_by_name(store: HashStore, both: Both) -> None:
    def refused(rank: int, names: list[str], what: str) -> None:
        asked = [Opening(name, 1 - rank, "ba"[rank], Sender()) for name in names]
        with pytest.raises(ConfigError, match=what):
            open_channels(store, rank, asked, timeout_s=TIMEOUT_S, address="127.0.0.1")

    both(
        lambda: refused(0, ["a", "b"], "'b' doesn't open channel 'b'"),
        lambda: refused(1, ["a"], "'a' opens channel 'b'"),
    )


def test_one_bound_for_two_channels_moves_everything(gloo_pair: MakePair, close_both: CloseBoth) -> None:
    sender = Sender(max_bytes_under_way=100_000)
    transport = Transport(num_connections=2, chunk_bytes=50_000, num_posted=3)
    pairs = [gloo_pair(transport, sender=sender, priority=priority) for priority in (1, 0)]
    for i in range(5):
        for a, _ in pairs:
            a.send(torch.full((400_001,), i, dtype=torch.uint8))
    for i in range(5):
        for _, b in pairs:
            found = b.recv(TIMEOUT_S, "x")
            assert found.numel() == 400_001
            assert bool((found == i).all())
    for a, b in pairs:
        close_both(a, b)


def hang(path: str) -> None:
    """Be the peer that is killed: open the channel, say so, and sleep."""
    store = FileStore(path, 2)
    channel = open_end(store, 1)
    store.set("open", "yes")
    time.sleep(600)
    assert channel


def test_killed_peer_ends_every_wait_at_once(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    process = multiprocessing.get_context("spawn").Process(target=hang, args=(str(tmp_path / "store"),), daemon=True)
    process.start()
    channel = open_end(store, 0)
    store.get("open")
    sendings = [channel.send(torch.zeros(50_000_000, dtype=torch.uint8)) for _ in range(3)]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(ChannelError, match=r"lost the connection to 'b'.*awaited 1B0"):
        channel.recv(TIMEOUT_S, "1B0")
    with pytest.raises(ChannelError, match="lost the connection to 'b'"):
        sendings[-1].wait(TIMEOUT_S)
    with pytest.raises(ChannelError, match="lost the connection to 'b'"):
        channel.send(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ChannelError, match="lost the connection to 'b'"):
        channel.close(TIMEOUT_S)
    assert time.monotonic() - start_s < TIMEOUT_S / 2
    process.join()
