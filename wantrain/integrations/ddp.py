"""Compressed gradients in torch's DistributedDataParallel: two lines, and all else stays as it is.

    model = DistributedDataParallel(model)
    model.register_comm_hook(ddp.State("error_feedback:quantized:4"), ddp.hook)

Buckets are averaged as in wantrain's own jobs: every piece goes through the codec straight to its owner and the average
straight back, over connections of their own, while the backward goes on (`comm/allreduce.py`). What a codec with error
feedback loses of a bucket is added to the bucket's next gradients. All members end with the same bits.

Gradients of any float type and device are averaged in fp32 in host memory. Residuals stay in the process: a job that is
resumed begins without them, as it began at first. (Annotations here are evaluated: torch looks at the hook's.)
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # what torch wants a hook annotated with

from wantrain.comm.allreduce import Handle
from wantrain.comm.low_rank import LowRank
from wantrain.errors import ConfigError
from wantrain.integrations.averager import Averager, close_at_exit, host_values


class _UnderWay(NamedTuple):
    """A bucket on its way."""

    turns: Iterator[None]
    """What is left to do, with a pause while an exchange goes on."""
    stream: torch.cuda.Stream | None
    """Where its gradients were made."""
    is_last: bool

    def take_turn(self) -> bool:
        """Go on to the next exchange or the end; say whether there is more to do."""
        with torch.cuda.stream(self.stream):  # None changes nothing
            for _ in self.turns:
                return True
        return False


class State:
    """What a model's hook keeps: connections to the other members, and what the codec owes of each bucket.

    Make one for each model, on every member of its process group and in the same order, after `init_process_group`.
    """

    def __init__(
        self,
        codec: str = "error_feedback:quantized:4",
        *,
        rank: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        bytes_per_s: float = 125e6,
        latency_s: float = 0.02,
        timeout_s: float = 600.0,
    ) -> None:
        """Connect to all members.

        `codec`: how gradients travel (`wantrain.codec_spec`). `rank`: of the factors that matrices travel as, through
        the codec; what is lost is then added to the next gradients with any codec (None: as they are).
        `process_group` is the model's (default: torch's own).
        `bytes_per_s` and one-way `latency_s` say how many connections a link gets and how much is under way on it, not
        how fast it is. `timeout_s`: how late a member may be. Raises ConfigError for a codec that can't do it, for a
        rank below 1 and without a process group, ChannelError where a member doesn't come.
        """
        if rank is not None and rank < 1:
            raise ConfigError(f"rank must be at least 1 (got {rank})")
        self.codec, self.rank, self.timeout_s = codec, rank, timeout_s
        self._averager = Averager(
            codec, process_group, bytes_per_s=bytes_per_s, latency_s=latency_s, timeout_s=timeout_s
        )
        self.world_size = self._averager.world_size
        self._residuals: dict[tuple[int, ...], Tensor] = {}
        self._low_ranks: dict[tuple[int, ...], LowRank] = {}
        self._step = 0
        self._under_way: queue.SimpleQueue[_UnderWay | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._complete, name="wantrain-ddp", daemon=True)
        self._waiter.start()
        self._is_open = True
        close_at_exit(self.close)

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin to average a bucket over all members, in place."""
        if bucket.index() == 0:
            self._averager.begin_step(self._step)
            if self._step == 1:
                self._residuals.clear()  # torch lays buckets out anew after the first step
                self._low_ranks.clear()
        buffer = bucket.buffer()
        buffer.div_(self.world_size)
        devices: list[int | str | torch.device] | None = [buffer.device] if buffer.is_cuda else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        stream = torch.cuda.current_stream(buffer.device) if buffer.is_cuda else None
        turns = self._whole(bucket) if self.rank is None else self._factored(bucket, self.rank)
        self._under_way.put(_UnderWay(_told(turns, buffer, future), stream, bucket.is_last()))
        if bucket.is_last():
            self._step += 1
        return future

    def _whole(self, bucket: GradBucket) -> Iterator[None]:
        """Begin to sum a bucket as it is; return what is left to do."""
        buffer = bucket.buffer()
        flat, key = host_values(buffer), _key(bucket)
        if self._averager.needs_residuals and key not in self._residuals:
            self._residuals[key] = torch.zeros_like(flat)
        handles = self._averager.start(flat, self._residuals.get(key))

        def turns() -> Iterator[None]:
            self._wait(handles)
            if flat is not buffer:
                buffer.copy_(flat)
            yield from ()

        return turns()

    def _factored(self, bucket: GradBucket, rank: int) -> Iterator[None]:
        """Make a bucket's left factors; return what is left to do, which alone exchanges anything.

        So exchanges are in one order on all members, however soon each comes by its gradients.
        """
        buffer, key = bucket.buffer(), _key(bucket)
        if key not in self._low_ranks:
            self._low_ranks[key] = LowRank([one.shape for one in bucket.parameters()], rank, buffer.device)
        low_rank = self._low_ranks[key]
        lefts = low_rank.left(buffer)
        host_lefts = host_values(lefts)

        def turns() -> Iterator[None]:
            handles = self._averager.start(host_lefts)
            yield
            self._wait(handles)
            lefts.copy_(host_lefts)
            rights = low_rank.right(lefts)
            total, lost = host_values(rights).clone(), torch.zeros(rights.shape)
            handles = self._averager.start(total, lost)
            yield
            self._wait(handles)
            low_rank.finish(lefts, rights.sub_(lost.to(rights.device)), total.to(rights.device), buffer)

        return turns()

    def _wait(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            handle.wait(self.timeout_s)

    def _complete(self) -> None:
        """Let buckets take turns as they come: the newest first, so that its exchange goes on meanwhile."""
        running: list[_UnderWay] = []
        while (newest := self._under_way.get()) is not None:
            running.insert(0, newest)
            while running:
                running = [bucket for bucket in running if bucket.take_turn()]
                if not newest.is_last:
                    break

    def close(self, timeout_s: float | None = None) -> None:
        """Part from the other members, who do so too; the end of the program does it by itself.

        Raises ChannelError where a member is late by `timeout_s` (default: the state's), or gone.
        """
        if not self._is_open:
            return
        self._is_open = False
        patience_s = self.timeout_s if timeout_s is None else timeout_s
        self._under_way.put(None)
        self._waiter.join(patience_s)
        self._averager.close(patience_s)


def _key(bucket: GradBucket) -> tuple[int, ...]:
    """Return what is a bucket's own from step to step: its parameters name it."""
    return tuple(map(id, bucket.parameters()))


def _told(turns: Iterator[None], buffer: Tensor, future: torch.futures.Future[Tensor]) -> Iterator[None]:
    """Carry out a bucket's turns, and tell torch how they ended."""
    try:
        yield from turns
        future.set_result(buffer)
    except Exception as caught:  # noqa: BLE001  the thread's edge: the backward that waits must hear of it
        future.set_exception(caught)  # type: ignore[arg-type]  # torch's annotation takes a result here


def hook(state: State, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients; for `DistributedDataParallel.register_comm_hook`."""
    return state.average(bucket)
