"""The torchrun line of each worker: one place that the launcher and `wantrain plan --commands` both take it from."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from wantrain.plan import Plan

MASTER_PORT = 29500
"""torchrun's own default."""


def train_argv(config: str, *options: str) -> list[str]:
    """Return what torchrun runs."""
    return ["-m", "wantrain", "train", config, *options]


def worker_argv(plan: Plan, worker: str, master: str, port: int, train: Sequence[str]) -> list[str]:
    """Return the line that starts one worker on its own host; `master` is where the first worker is reached."""
    return [
        *("torchrun", "--nnodes", str(plan.world_size), "--nproc-per-node", "1"),
        *("--node-rank", str(plan.rank_of(worker)), "--master-addr", master, "--master-port", str(port)),
        *train,
        *("--worker", worker),
    ]


def single_host_argv(plan: Plan, port: int, train: Sequence[str]) -> list[str]:
    """Return the line that starts all workers on this host."""
    place = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return ["torchrun", "--nnodes", "1", "--nproc-per-node", str(plan.world_size), *place, *train]


def with_this_python(argv: Sequence[str]) -> list[str]:
    """Replace the name `torchrun` by this interpreter's own, whatever PATH says."""
    return [sys.executable, "-m", "torch.distributed.run", *argv[1:]]
