"""Whole jobs inside one process: a thread per rank over loopback channels, or a process per rank over gloo."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from wantrain.comm.loopback import LoopbackJob
from wantrain.data import Lanes, Samples
from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.plan import Plan
from wantrain.profile import gpt_profile
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology
from wantrain.training.trainer import Batch, OptimizerFactory, Trainer

MODEL = ModelConfig(num_layers=4, hidden=32, num_heads=2, seq_len=16, vocab_size=64)
SAMPLES = Samples(np.random.default_rng(0).integers(0, 64, 16 * 400 + 1, dtype=np.uint8), 0, 16 * 400 + 1, 16)
TIMEOUT_S = 150.0
_ADAMW = partial(torch.optim.AdamW, lr=1e-2)

T = TypeVar("T")

sys.setswitchinterval(2e-4)  # ranks are threads that wait for each other all the time: 5 ms at each turn add up


def flat_topology(num_workers: int, bandwidth: str = "1 Gbit/s", latency: str = "1 ms") -> Topology:
    """Return workers that all reach each other alike."""
    return Topology.parse(
        {
            "name": "flat",
            "worker": [{"name": "w", "count": num_workers, "site": "s"}],
            "link": [{"within": "s", "bandwidth": bandwidth, "latency": latency}],
        },
        TopologyError,
        "flat",
    )


def small_plan(stages: int, replicas: int, *, model: ModelConfig = MODEL, **choices: Any) -> Plan:
    """Plan the small model; the batch is 8 samples in microbatches of 1 unless said otherwise."""
    given: dict[str, Any] = {"batch_size": 8, "num_lanes": 4, "bucket_bytes": 8192} | choices
    profile = gpt_profile(model, given.pop("microbatch_size", 1))
    return make_plan(flat_topology(stages * replicas), profile, num_stages=stages, num_replicas=replicas, **given)


def change(plan: Plan, **values: Any) -> Plan:
    """Return the plan with other values, checked again."""
    return Plan.parse(plan.model_dump() | values, PlanError, "plan")


def run_ranks(num_ranks: int, body: Callable[[int], T], timeout_s: float = TIMEOUT_S) -> list[T]:
    """Run `body(rank)` in a thread for each rank; return the results, or raise the first error."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def guarded(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as caught:  # noqa: BLE001  the thread's edge: handed on below
            errors[rank] = caught

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    for rank in sorted(errors):
        raise errors[rank]
    assert len(results) == num_ranks, f"ranks {sorted(set(range(num_ranks)) - set(results))} hang"
    return [results[rank] for rank in range(num_ranks)]


def make_trainer(
    plan: Plan,
    membership: Any,
    rank: int,
    *,
    model: ModelConfig = MODEL,
    seed: int = 1,
    optimizer: OptimizerFactory = _ADAMW,
    layers: Callable[[], Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    """Return the trainer of one rank of the small model; `layers` makes the whole of it, if another way."""
    return Trainer(
        layers() if layers is not None else lambda first, end: gpt.build_layers(model, first, end, seed),
        plan,
        loss=gpt.loss,
        worker=plan.workers[rank],
        optimizer=optimizer,
        tied=gpt.tied_parameters,
        before_forward=lambda layers, step, samples: gpt.set_dropout_keys(layers, seed, step, samples),
        timeout_s=TIMEOUT_S,
        membership=membership,
        **kwargs,
    )


def replica_batch(plan: Plan, replica: int, step: int) -> Batch:
    """Return what a replica trains on in a step."""
    drawn = Lanes(len(SAMPLES), plan.num_lanes, seed=3).draw(step, plan.batch_size)
    ids = [sample for lane in plan.replicas[replica].lanes for sample in drawn[lane]]
    inputs, targets = SAMPLES.batch(ids)
    return Batch(ids, torch.from_numpy(inputs), torch.from_numpy(targets))


class Outcome:
    """What a job gave: losses and gradient norms by step, gradients of the first step and final weights by layer."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.first_grads: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.samples: list[list[int]] = []


def train_rank(trainer: Trainer, num_steps: int, first_step: int = 0) -> Outcome:
    """Train some steps on one rank."""
    outcome = Outcome()
    for step in range(first_step, first_step + num_steps):
        batch = replica_batch(trainer.plan, trainer.replica, step)
        outcome.samples.append(list(batch.sample_ids))
        result = trainer.step(batch)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        if step == first_step:
            outcome.first_grads = named(trainer, lambda p: p.grad)
    outcome.weights = named(trainer, lambda p: p)
    return outcome


def named(trainer: Trainer, value: Callable[[torch.nn.Parameter], Any]) -> dict[str, torch.Tensor]:
    """Collect a value of every parameter, by layer and name."""
    return {
        f"{index}.{name}": value(parameter).detach().clone()
        for index, layer in trainer.layers.items()
        for name, parameter in layer.named_parameters()
    }


def train_job(plan: Plan, num_steps: int = 3, **kwargs: Any) -> list[Outcome]:
    """Train over loopback, a thread per rank; return every rank's outcome."""
    job = LoopbackJob(plan.world_size)

    def body(rank: int) -> Outcome:
        trainer = make_trainer(plan, job.member(rank), rank, **kwargs)
        outcome = train_rank(trainer, num_steps)
        trainer.close()
        return outcome

    torch.set_num_threads(1)
    return run_ranks(plan.world_size, body)


def joined(outcomes: Sequence[Outcome], of: Callable[[Outcome], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join what the ranks hold; later replicas overwrite earlier ones with what must be the same."""
    return {name: tensor for outcome in outcomes for name, tensor in of(outcome).items()}
