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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # what torch wants a hook annotated with

from wantrain.comm.allreduce import Handle
from wantrain.errors import ChannelError
from wantrain.integrations.averager import Averager, host_values

_Done = Callable[[], None]

_AT_EXIT_S = 20.0
"""Chosen: members end within seconds of each other, or not at all."""


class State:
    """What a model's hook keeps: connections to the other members, and what the codec owes of each bucket.

    Make one for each model, on every member of its process group and in the same order, after `init_process_group`.
    """

    def __init__(
        self,
        codec: str = "error_feedback:quantized:4",
        *,
        process_group: dist.ProcessGroup | None = None,
        bytes_per_s: float = 125e6,
        latency_s: float = 0.02,
        timeout_s: float = 600.0,
    ) -> None:
        """Connect to all members.

        `codec`: how gradients travel (`wantrain.codec_spec`). `process_group` is the model's (default: torch's own).
        `bytes_per_s` and one-way `latency_s` say how many connections a link gets and how much is under way on it, not
        how fast it is. `timeout_s`: how late a member may be. Raises ConfigError for a codec that can't do it or
        without a process group, ChannelError where a member doesn't come.
        """
        self.codec, self.timeout_s = codec, timeout_s
        self._averager = Averager(
            codec, process_group, bytes_per_s=bytes_per_s, latency_s=latency_s, timeout_s=timeout_s
        )
        self.world_size = self._averager.world_size
        self._residuals: dict[tuple[int, ...], Tensor] = {}
        self._step = 0
        self._under_way: queue.SimpleQueue[_Done | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._complete, name="wantrain-ddp", daemon=True)
        self._waiter.start()
        self._is_open = True
        threading._register_atexit(self._close_at_exit)  # type: ignore[attr-defined]  # atexit's are too late for threads

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin to average a bucket over all members, in place."""
        if bucket.index() == 0:
            self._averager.begin_step(self._step)
        if bucket.is_last():
            self._step += 1
        buffer = bucket.buffer()
        flat = host_values(buffer.div_(self.world_size))
        handles = self._averager.start(flat, self._residual(bucket, flat))
        devices: list[int | str | torch.device] | None = [buffer.device] if buffer.is_cuda else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._under_way.put(partial(self._end, handles, flat, buffer, future))
        return future

    def _residual(self, bucket: GradBucket, flat: Tensor) -> Tensor | None:
        """Return what is owed of a bucket, which its parameters name: torch lays buckets out anew after a step."""
        if not self._averager.needs_residuals:
            return None
        if bucket.index() == 0 and self._step == 1:
            self._residuals.clear()  # of the first layout
        key = tuple(map(id, bucket.parameters()))
        if key not in self._residuals:
            self._residuals[key] = torch.zeros_like(flat)
        return self._residuals[key]

    def _complete(self) -> None:
        """Tell torch of each bucket that has come, in their order."""
        while (done := self._under_way.get()) is not None:
            done()

    def _end(
        self, handles: Sequence[Handle], flat: Tensor, buffer: Tensor, future: torch.futures.Future[Tensor]
    ) -> None:
        try:
            for handle in handles:
                handle.wait(self.timeout_s)
            if flat is not buffer:
                buffer.copy_(flat)
            future.set_result(buffer)
        except Exception as caught:  # noqa: BLE001  the thread's edge: the backward that waits must hear of it
            future.set_exception(caught)  # type: ignore[arg-type]  # torch's annotation takes a result here

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

    def _close_at_exit(self) -> None:
        """Let threads end while the interpreter still can; a member that is gone is no news by then."""
        with suppress(ChannelError):
            self.close(_AT_EXIT_S)


def hook(state: State, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients; for `DistributedDataParallel.register_comm_hook`."""
    return state.average(bucket)
