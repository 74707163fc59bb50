"""Pairs of channel ends: in one process, and over real sockets."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from wantrain.comm.channel import Channel, SendEvent, TwoWay
from wantrain.comm.loopback import loopback_pair
from wantrain.comm.sender import Sender
from wantrain.comm.torch_channel import Opening, open_channels
from wantrain.wire import Transport

MakePair = Callable[..., tuple[Channel, Channel]]
TIMEOUT_S = 30.0


@pytest.fixture(name="both")
def both_fixture() -> Callable[..., tuple[object, object]]:
    """Give tests `both`: test modules can't import each other."""
    return both


@pytest.fixture(name="close_both")
def close_both_fixture() -> Callable[[Channel, Channel], None]:
    """Give tests `close_both`."""
    return close_both


def both(first: Callable[[], object], second: Callable[[], object]) -> tuple[object, object]:
    """Run two ends at once and return what they return; raise what either raises."""
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        return one.result(), two.result()


def close_both(a: Channel, b: Channel) -> None:
    both(lambda: a.close(TIMEOUT_S), lambda: b.close(TIMEOUT_S))


@pytest.fixture
def store() -> HashStore:
    """Return a store for both ends in this process; a TCPStore asks the name server for each connection's name."""
    return HashStore()


@pytest.fixture
def gloo_pair(store: HashStore) -> MakePair:
    """Make the ends at workers 'a' and 'b', connected through real sockets."""
    names = iter(f"pair{i}" for i in range(100))

    def make(
        transport: Transport | None = None,
        on_event: SendEvent | None = None,
        sender: Sender | None = None,
        priority: int = 0,
    ) -> tuple[Channel, Channel]:
        name = next(names)

        def end(rank: int) -> Channel:
            used = (sender if rank == 0 else None) or Sender()
            opening = Opening(
                name, 1 - rank, "ba"[rank], used, transport or Transport(), priority, on_event if rank == 0 else None
            )
            (channel,) = open_channels(store, rank, [opening], timeout_s=TIMEOUT_S, address="127.0.0.1")
            return channel

        a, b = both(lambda: end(0), lambda: end(1))
        assert isinstance(a, Channel)
        assert isinstance(b, Channel)
        return a, b

    return make


@pytest.fixture(params=["loopback", "gloo", "gloo spread", "two way"])
def make_pair(request: pytest.FixtureRequest, gloo_pair: MakePair) -> Iterator[MakePair]:
    """Make pairs of every kind of channel, and close what the test left open."""
    made: list[tuple[Channel, Channel]] = []

    def make(on_event: SendEvent | None = None) -> tuple[Channel, Channel]:
        if request.param == "loopback":
            made.append(loopback_pair("a", "b", on_event))
        elif request.param == "two way":
            (there, there_end), (back, back_end) = loopback_pair("a", "b", on_event), loopback_pair("a", "b")
            made.append((TwoWay(there, back), TwoWay(back_end, there_end)))
        else:
            spread = Transport(num_connections=3, chunk_bytes=10_000, num_posted=2)
            made.append(gloo_pair(spread if "spread" in request.param else None, on_event))
        return made[-1]

    yield make
    for a, b in made:
        close_both(a, b)
