"""How the processes of a job find each other, and small values that all of them exchange.

torchrun says where to meet (MASTER_ADDR, MASTER_PORT) and how many come (WORLD_SIZE); which rank a process has follows
from the plan, because the plan says who holds what and torchrun numbers processes as they come. The group is our own,
not torch.distributed's default one: it listens on the address that leads to the others, and two can live in a process.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import Work
from torch.distributed.rendezvous import rendezvous

from wantrain.comm.channel import Channel
from wantrain.comm.gloo import Device, Pair, private_store, reason
from wantrain.comm.meeting import meet
from wantrain.comm.pairs import Wanted, connect_pairs
from wantrain.comm.torch_channel import Opening, open_channels
from wantrain.errors import ChannelError, ConfigError, PlanError

_ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


class Membership(ABC):
    """A rank's place in a job: what all ranks tell each other, and channels to some of them."""

    rank: int
    world_size: int

    @abstractmethod
    def all_exchange(self, values: Sequence[float], timeout_s: float, awaited: str = "values") -> list[list[float]]:
        """Return the values of every rank, in order; all ranks call it with equally many.

        Raise ChannelError where a rank is gone, or late by `timeout_s`.
        """

    @abstractmethod
    def expect_exchange(self, num_values: int, awaited: str = "values") -> None:
        """Say early that the next exchange is of so many values, so that none has to wait until it is asked for."""

    @abstractmethod
    def gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Return the plain value of every rank, in order: for what is small and rare."""

    @abstractmethod
    def open_channels(self, asked: Sequence[Opening], timeout_s: float) -> list[Channel]:
        """Connect to peers, each of which opens the channels between the two in one call as well."""

    @abstractmethod
    def leave(self, timeout_s: float) -> None:
        """End together with all other ranks."""


class _Expected(NamedTuple):
    """An exchange whose receives are posted: its tag, a row for each rank, and the receives by rank."""

    tag: int
    rows: list[Tensor]
    receiving: list[tuple[int, Work]]


class TorchMembership(Membership):
    """This process's place in a torchrun job: the store shared by all, and a group with every other process."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        address: str | None,
        timeout_s: float,
        names: Sequence[str] = (),
    ) -> None:
        """Connect to all others; `names` are the workers' by rank, for errors."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.address = address
        self._num_exchanges = 0
        self._expected: _Expected | None = None
        self._num_gathers = 0
        self._names = [f"worker '{name}'" for name in names] or [f"rank {one}" for one in range(world_size)]
        others = [one for one in range(world_size) if one != rank]
        wanted = [Wanted(other, "all") for other in others]
        made = connect_pairs(store, rank, wanted, Device(address), timeout_s, names=dict(enumerate(self._names)))
        self._pairs: dict[int, Pair] | None = dict(zip(others, made, strict=True))

    def all_exchange(self, values: Sequence[float], timeout_s: float, awaited: str = "values") -> list[list[float]]:
        """Send straight to every other rank; a time-out ends the membership's connections.

        It takes one latency where `expect_exchange` was called in time, else up to three: gloo sends nothing before it
        has heard that it is awaited.
        """
        if self._expected is None:
            self.expect_exchange(len(values), awaited)
        tag, rows, receiving = self._expected_now()
        own = torch.tensor([len(values), *values], dtype=torch.float64)
        if len(own) != len(rows[self.rank]):
            raise ChannelError(f"{len(values)} {awaited} are exchanged where {len(rows[self.rank]) - 1} were expected")
        rows[self.rank].copy_(own)
        sending = [(rank, self._start(rank, tag, own, awaited, is_send=True)) for rank, _ in receiving]
        for rank, work in receiving + sending:
            _wait(work, self._names[rank], timeout_s, awaited)
        for rank, row in enumerate(rows):
            if row[0] != len(values):
                raise ChannelError(
                    f"{self._names[rank]} sent {int(row[0])} {awaited} (expected {len(values)}); use one version"
                )
        return [row[1:].tolist() for row in rows]

    def expect_exchange(self, num_values: int, awaited: str = "values") -> None:
        """Let the others know that this rank is ready to receive; they wait for it before they send."""
        if self._expected is not None:
            return
        tag = self._num_exchanges
        self._num_exchanges += 1
        rows = [torch.zeros(1 + num_values, dtype=torch.float64) for _ in range(self.world_size)]
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        receiving = [(rank, self._start(rank, tag, rows[rank], awaited, is_send=False)) for rank in others]
        self._expected = _Expected(tag, rows, receiving)

    def _expected_now(self) -> _Expected:
        expected, self._expected = self._expected, None
        assert expected is not None
        return expected

    def gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Leave the value in the store and take everyone's."""
        number = self._num_gathers
        self._num_gathers += 1
        keys = [f"gather/{number}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.set(keys[self.rank], json.dumps(value))
            self.store.wait(keys, timedelta(seconds=timeout_s))  # together: across an ocean every question counts
            return [json.loads(value) for value in self.store.multi_get(keys)]
        except RuntimeError as caught:
            raise ChannelError(
                f"{self._missing(keys)} did not answer within {timeout_s:g} s ({reason(caught)}); is it running?"
            ) from None

    def _missing(self, keys: Sequence[str]) -> str:
        """Return whose key is missing first; where the store itself is gone, it is rank 0, which keeps it."""
        with suppress(RuntimeError):
            for name, key in zip(self._names, keys, strict=True):
                if not self.store.check([key]):
                    return name
        return self._names[0]

    def open_channels(self, asked: Sequence[Opening], timeout_s: float) -> list[Channel]:
        """Open channels over gloo; any thread may."""
        store = private_store(self.store)
        return [*open_channels(store, self.rank, asked, timeout_s=timeout_s, address=self.address)]

    def leave(self, timeout_s: float) -> None:
        """End together: wait for all to leave, then let the connections go."""
        self.all_exchange([], timeout_s, "the end")
        self._pairs = None

    def _start(self, rank: int, tag: int, buffer: Tensor, awaited: str, is_send: bool) -> Work:
        if self._pairs is None:
            raise ChannelError(f"this worker has left the job; awaited {awaited}")
        pair = self._pairs[rank]
        try:
            return pair.send(buffer, tag) if is_send else pair.recv(buffer, tag)
        except RuntimeError as caught:
            raise _lost(self._names[rank], caught, awaited) from None


def join(
    world_size: int, rank: int, timeout_s: float, names: Sequence[str] = (), address: str | None = None
) -> TorchMembership:
    """Meet the other processes of a job where torchrun's environment says; `world_size` and `rank` are the plan's.

    Raise PlanError where the plan is for another number of processes or two processes claim a rank, ConfigError where
    the environment lacks something or the port is taken, ChannelError where somebody doesn't come.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigError(f"the environment lacks {', '.join(missing)}; start with torchrun or wantrain launch")
    started = int(os.environ["WORLD_SIZE"])
    if started != world_size:
        raise PlanError(
            f"the plan is for {world_size} processes (got {started}); start as many as the plan has workers"
        )
    store = _meet(timeout_s)
    if address is None and "GLOO_SOCKET_IFNAME" not in os.environ:
        address = _address_towards(os.environ["MASTER_ADDR"])
        _refuse_loopback(address, world_size)
    called = [f"worker '{name}'" for name in names] or [f"rank {one}" for one in range(world_size)]
    return TorchMembership(
        meet(store, rank, world_size, timeout_s, called), rank, world_size, address, timeout_s, names
    )


def join_process_group(group: dist.ProcessGroup | None, timeout_s: float) -> TorchMembership:
    """Join with the members of a process group of torch.distributed (default: its own), by way of its store.

    All members call it equally often. Raise ConfigError where there is no group or this process is not in it,
    ChannelError where a member doesn't come.
    """
    if not dist.is_initialized():
        raise ConfigError("torch.distributed has no process group; call init_process_group first")
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() not in ranks:
        raise ConfigError(f"rank {dist.get_rank()} is not in the process group (it has {ranks})")
    number = _num_joined.setdefault(tuple(ranks), itertools.count())
    purpose = f"wantrain/group-{'-'.join(map(str, ranks))}/{next(number)}"
    store = PrefixStore(purpose, dist.distributed_c10d._get_default_store())
    address = None
    if "GLOO_SOCKET_IFNAME" not in os.environ and "MASTER_ADDR" in os.environ:
        address = _address_towards(os.environ["MASTER_ADDR"])
    return TorchMembership(store, ranks.index(dist.get_rank()), len(ranks), address, timeout_s)


_num_joined: dict[tuple[int, ...], Iterator[int]] = {}
"""How often this process joined with the same ranks: a store's names are used once."""


def _meet(timeout_s: float) -> Store:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store: Store
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except (RuntimeError, ValueError) as caught:
        if "EADDRINUSE" in str(caught) or "in use" in str(caught):
            raise ConfigError(f"port taken ({place}); choose another MASTER_PORT") from None
        raise ChannelError(f"can't meet at {place} ({reason(caught)}); is its host running?") from None
    return store


def _address_towards(host: str) -> str | None:
    """Return the local address from which packets to `host` leave; connecting a UDP socket sends none."""
    family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(place)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _refuse_loopback(address: str | None, world_size: int) -> None:
    """Raise ConfigError where other hosts could not reach this one: Debian gives a host's own name to 127.0.1.1."""
    is_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))) == world_size
    if address is not None and address.startswith("127.") and not is_one_host:
        raise ConfigError(
            f"MASTER_ADDR leads to {address}, where no other host reaches this one; give its outside address,"
            " or the worker's in the topology, or set GLOO_SOCKET_IFNAME"
        )


def _wait(work: Work, who: str, timeout_s: float, awaited: str) -> None:
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as caught:
        raise _lost(who, caught, f"{awaited}, for up to {timeout_s:g} s") from None


def _lost(who: str, caught: RuntimeError, awaited: str) -> ChannelError:
    return ChannelError(f"lost {who} ({reason(caught)}); awaited {awaited}")
