"""Programs of torch.distributed in several processes of a test's own."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 100.0
WORLD_SIZE = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process_group(rank: int, port: int) -> Iterator[None]:
    """Be a member of torch's own process group for a while."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    yield
    dist.destroy_process_group()


def said_by_members(be_member: Callable[[int, Sequence[int], Any], None], num_groups: int) -> list[Any]:
    """Return what members say, by rank. Each puts its rank and that into the queue that it is given beside its ports,
    one for each process group, one after the other: starting a process takes longer than all of them."""
    context = multiprocessing.get_context("spawn")
    results: Queue[Any] = context.Queue()
    ports = [free_port() for _ in range(num_groups)]
    arguments = [(rank, ports, results) for rank in range(WORLD_SIZE)]
    members = [context.Process(target=be_member, args=one, daemon=True) for one in arguments]
    for member in members:
        member.start()
    said = dict(results.get(timeout=TIMEOUT_S) for _ in members)
    for member in members:
        member.join(TIMEOUT_S)
        assert member.exitcode == 0
    return [said[rank] for rank in range(WORLD_SIZE)]
