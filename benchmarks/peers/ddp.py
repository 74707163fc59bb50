"""torch's DistributedDataParallel on emulated layers, over gloo, with its own communication hooks and with wantrain's.

Replicas of a whole model and no pipeline. Layers sleep as wantrain's do; buckets (25 MB), overlap with the last
microbatch's backward and hooks are torch's. PowerSGD compresses from the third step on, in one bucket: its
hook waits for one exchange inside another's callback, and gloo, with two threads, stands still when buckets overlap.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from wantrain.integrations import ddp as wantrain_ddp
from wantrain.models.emulated import EmulatedLayer, emulated_loss


def _fp16(ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def _power_sgd(rank: int, ddp: DistributedDataParallel) -> None:
    state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook)


def _wantrain(codec: str, rank: int | None, ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(wantrain_ddp.State(codec, rank=rank), wantrain_ddp.hook)


_ONE_BUCKET_MB = 100_000
"""More than any model here has."""

HOOKS: dict[str, Callable[[DistributedDataParallel], None]] = {
    "torch DDP": lambda _: None,
    "torch DDP, fp16 hook": _fp16,
    "torch DDP, PowerSGD hook": partial(_power_sgd, 4),
    "torch DDP, PowerSGD hook, rank 16": partial(_power_sgd, 16),
    "torch DDP, wantrain hook": partial(_wantrain, "error_feedback:quantized:4", None),
    "torch DDP, wantrain hook, 2 bits": partial(_wantrain, "error_feedback:hadamard:2", None),
    "torch DDP, wantrain hook, rank 32": partial(_wantrain, "quantized:4", 32),
}
"""PowerSGD's is of rank 4 where nothing is said, wantrain's of 4 bits, with a rank too."""


def with_hook(name: str, model: nn.Module) -> DistributedDataParallel:
    """Return the model in DDP, with a hook by its name."""
    bucket_mb = _ONE_BUCKET_MB if "PowerSGD" in name else None
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    HOOKS[name](ddp)
    return ddp


def train(
    name: str, layers: Sequence[EmulatedLayer], optimizer: Any, batch: Any, microbatch_size: int, steps: int
) -> list[float]:
    """Train steps of a peer by its name; return the seconds of each on this rank, as they passed.

    `batch`: this replica's inputs [samples, 1]; gradients add up over microbatches and are exchanged in the last one.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", address, rank=rank, world_size=world_size)
    for layer in layers:
        _as_matrix(layer.weight)
    ddp = with_hook(name, nn.Sequential(*layers))
    starts = range(0, len(batch), microbatch_size)
    times = []
    for _ in range(steps):
        dist.barrier()
        began_s = time.monotonic()
        for start in starts:
            is_last = start == starts[-1]
            with nullcontext() if is_last else ddp.no_sync():
                output = ddp(batch[start : start + microbatch_size])
                torch.autograd.backward(emulated_loss(output, output))
        optimizer.step()
        ddp.zero_grad()
        times.append(time.monotonic() - began_s)
    dist.barrier()  # nothing is under way any more
    del ddp  # the last to hold its process group, it would wait for gloo's threads with the interpreter's lock in hand
    dist.destroy_process_group()
    return times


def _as_matrix(weight: nn.Parameter) -> None:
    """Give a weight two dimensions, as near a square as they come: PowerSGD leaves vectors as they are."""
    rows = next(n for n in itertools.count(int(weight.numel() ** 0.5), -1) if weight.numel() % n == 0)
    weight.data = weight.data.view(rows, -1)
