"""Whatever the plan, nothing waits in a circle: random small plans, three steps each, over loopback and over gloo."""

import random

import pytest
import torch
from torch.distributed import HashStore

from tests.jobs import TIMEOUT_S, Outcome, change, make_trainer, run_ranks, small_plan, train_job, train_rank
from wantrain.comm.groups import TorchMembership
from wantrain.plan import Plan


def random_plan(seed: int) -> Plan:
    """Return a plan of up to twelve ranks with odd depths, buckets, chunks, windows and bounds."""
    draw = random.Random(seed)
    stages, replicas = draw.choice([(1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)])
    lanes = draw.randint(replicas, 6)
    batch = lanes * draw.randint(1, 3)
    kind = draw.choice(["1f1b", "gpipe", "zero_bubble"])
    plan = small_plan(stages, replicas, batch_size=batch, num_lanes=lanes, schedule=kind)
    depths = sorted((draw.randint(1, batch) for _ in range(stages)), reverse=True)
    transport = {
        "num_connections": draw.randint(1, 3),
        "chunk_bytes": draw.choice([100, 1000, 65536]),
        "num_posted": draw.randint(2, 4),
    }
    postponed = [draw.randint(0, batch) if kind == "zero_bubble" else 0 for _ in range(stages)]
    workers = [name for name in plan.workers if draw.random() < 0.5]
    return change(
        plan,
        stages=[
            stage.model_dump() | {"max_in_flight": depth, "max_postponed": later}
            for stage, depth, later in zip(plan.stages, depths, postponed, strict=True)
        ],
        boundaries=[{"transports": [transport] * replicas} for _ in range(stages - 1)],
        gradient_transport=transport,
        bucket_bytes=draw.choice([1, 1000, 10_000, 10_000_000]),
        under_way_bytes={name: draw.choice([1, 500, 5000]) for name in workers},
    )


def train_over_gloo(plan: Plan, num_steps: int = 3) -> list[Outcome]:
    """Train over real sockets, a thread per rank."""
    store = HashStore()

    def body(rank: int) -> Outcome:
        member = TorchMembership(store, rank, plan.world_size, "127.0.0.1", TIMEOUT_S)
        trainer = make_trainer(plan, member, rank)
        outcome = train_rank(trainer, num_steps)
        trainer.close()
        return outcome

    torch.set_num_threads(1)
    return run_ranks(plan.world_size, body)


def check_ends_with_falling_loss(outcomes: list[Outcome]) -> None:
    assert all(len(outcome.losses) == 3 for outcome in outcomes)
    assert all(outcome.losses == outcomes[0].losses for outcome in outcomes)
    assert all(0 < loss < 10 for loss in outcomes[0].losses)


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_end_over_loopback(seed: int) -> None:
    check_ends_with_falling_loss(train_job(random_plan(seed)))


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_end_over_gloo_with_the_numbers_of_loopback(seed: int) -> None:
    plan = random_plan(1000 + seed)
    outcomes = train_over_gloo(plan)
    check_ends_with_falling_loss(outcomes)
    assert outcomes[0].losses == train_job(plan)[0].losses


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_random_plans_end_over_loopback_and_gloo() -> None:
    for seed in range(200):
        plan = random_plan(2000 + seed)
        assert train_over_gloo(plan)[0].losses == train_job(plan)[0].losses, f"seed {2000 + seed}"
