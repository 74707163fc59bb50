"""A run directory as a job of 2 stages × 2 replicas over two sites would leave it, without running one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from wantrain.plan import Plan
from wantrain.run_directory import (
    CodecLoss,
    LinkMeasurement,
    LinkTraffic,
    NetworkRecord,
    RunDirectory,
    StepRecord,
    ValidationRecord,
)
from wantrain.scheduler.simulator import Workload, simulate
from wantrain.timeline import Timeline
from wantrain.topology import Topology

TOPOLOGY = """\
name = "two_sites"
[[worker]]
name = "oregon"
count = 2
site = "oregon"
memory = "4 GB"
[[worker]]
name = "virginia"
count = 2
site = "virginia"
memory = "2 GB"
[[link]]
within = "oregon"
bandwidth = "1 Gbit/s"
latency = "1 ms"
[[link]]
within = "virginia"
bandwidth = "1 Gbit/s"
latency = "1 ms"
[[link]]
between = ["oregon", "virginia"]
bandwidth = "100 Mbit/s"
latency = "20 ms"
"""

PLAN = {
    "topology": "two_sites",
    "model": "gpt-4m",
    "num_layers": 8,
    "batch_size": 16,
    "microbatch_size": 1,
    "num_lanes": 4,
    "schedule": "1f1b",
    "stages": [
        {"first_layer": 0, "end_layer": 4, "max_in_flight": 4},
        {"first_layer": 4, "end_layer": 8, "max_in_flight": 1},
    ],
    "replicas": [
        {"workers": ["oregon-0", "oregon-1"], "num_microbatches": 8, "lanes": [0, 1]},
        {"workers": ["virginia-0", "virginia-1"], "num_microbatches": 8, "lanes": [2, 3]},
    ],
    "boundaries": [{"transports": [{}, {}]}],
    "prediction": {
        "step_s": 0.62,
        "compute_s": 0.4,
        "bubble_s": 0.1,
        "exposed_communication_s": 0.12,
        "memory_bytes": {
            "oregon-0": 310_000_000,
            "oregon-1": 280_000_000,
            "virginia-0": 310_000_000,
            "virginia-1": 280_000_000,
        },
        "bottleneck": "the link virginia-0 → oregon-0",
    },
}

NUM_STEPS = 60
TOKENS_PER_STEP = 4096
BEGAN_AT = 1.7e9


def make_plan() -> Plan:
    return Plan.model_validate_json(json.dumps(PLAN))


def play(topology: Topology, slower: float = 1.0) -> Timeline:
    """Simulate a step; `slower` stretches the compute, as a measurement would differ from a prediction."""
    workload = Workload(
        forward_s=tuple(0.016 * slower * (1 + 0.1 * rank) for rank in range(4)),
        backward_s=tuple(0.032 * slower * (1 + 0.05 * rank) for rank in range(4)),
        step_s=(0.01,) * 4,
        forward_bytes=(262144, 0),
        backward_bytes=(0, 262144),
        bucket_bytes=((1_200_000, 900_000), (1_200_000, 700_000)),
    )
    return simulate(make_plan(), topology, workload)


def loss_at(step: int, noise: random.Random) -> float:
    return 1.5 + 4.0 * math.exp(-step / 12) + noise.uniform(-0.06, 0.06)


def step_record(rank: int, step: int, workers: tuple[str, ...]) -> StepRecord:
    """One rank's line of a step: it sends to its pipeline neighbour and to its twin of the other replica."""
    noise = random.Random(1000 * step)
    step_s = 0.66 + noise.uniform(-0.03, 0.06) + (0.5 if step == 0 else 0.0)
    neighbour, twin = workers[rank ^ 1], workers[(rank + 2) % 4]
    return StepRecord(
        step=step,
        loss=loss_at(step, noise),
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=TOKENS_PER_STEP,
        step_s=step_s,
        compute_s=0.39 + 0.02 * rank,
        waited_s={neighbour: 0.06 + 0.01 * rank},
        sent={
            neighbour: LinkTraffic(raw_bytes=2_097_152, wire_bytes=2_099_000, busy_s=0.018),
            twin: LinkTraffic(raw_bytes=2_100_000, wire_bytes=2_100_600, busy_s=0.18 + 0.02 * rank),
        },
        finished_at=BEGAN_AT + 0.7 * (step + 1),
        codecs={f"{neighbour}/forward": CodecLoss(relative_error=0.1 / (step + 1), clipped_share=0.01, bits=4)},
    )


def write_steps(run: RunDirectory, steps: range, workers: tuple[str, ...], shift_s: float = 0.0) -> None:
    """Append records of all ranks, and a validation every tenth step."""
    for rank in range(len(workers)):
        run.metrics(rank).parent.mkdir(parents=True, exist_ok=True)
        with run.metrics(rank).open("a", encoding="utf-8") as file:
            for step in steps:
                record = step_record(rank, step, workers)
                record = record.model_copy(update={"finished_at": record.finished_at + shift_s})
                file.write(record.model_dump_json() + "\n")
                if rank == 0 and step % 10 == 9:
                    held_out = ValidationRecord(step=step, validation_loss=1.55 + 4.0 * math.exp(-step / 12))
                    file.write(held_out.model_dump_json() + "\n")


def write_timelines(run: RunDirectory, topology: Topology, steps: range) -> None:
    for step in steps:
        timeline = play(topology, slower=1.02 + step / 500)
        for rank in range(4):
            run.timelines(rank).parent.mkdir(parents=True, exist_ok=True)
            events = [_with_peer(event, timeline.workers) for event in timeline.of_rank(rank)]
            line = {"step": step, "began_at": BEGAN_AT + step, "dilation": 1.0, "events": events}
            with run.timelines(rank).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _with_peer(event: tuple[object, ...], workers: tuple[str, ...]) -> list[object]:
    """Name whom a wait was for, which only a measurement says."""
    rank, kind, *times, microbatch, peer, num_bytes = event
    if kind == "wait" and isinstance(rank, int):
        peer = workers[rank ^ 1] if microbatch != -1 else workers[(rank + 2) % 4]
    return [rank, kind, *times, microbatch, peer, num_bytes]


def network_record(topology: Topology) -> NetworkRecord:
    noise = random.Random(7)
    links = [
        LinkMeasurement(
            source=a.name,
            target=b.name,
            asked_bytes_per_s=0.955 * link.bandwidth_bytes_per_s,
            measured_bytes_per_s=0.955 * link.bandwidth_bytes_per_s * noise.uniform(0.97, 1.01),
            asked_latency_s=link.latency_s,
            measured_latency_s=link.latency_s + noise.uniform(0.0001, 0.0005),
        )
        for a, b, link in topology.pairs()
    ]
    links[-1] = links[-1].model_copy(update={"measured_bytes_per_s": 0.8 * links[-1].asked_bytes_per_s})
    return NetworkRecord(delay_by="nfqueue", dilation=2.0, links=tuple(links))


@pytest.fixture
def topology(tmp_path: Path) -> Topology:
    path = tmp_path / "two_sites.toml"
    path.write_text(TOPOLOGY, encoding="utf-8")
    return Topology.load(path)


@pytest.fixture
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def finished_run(tmp_path: Path, topology: Topology, plan: Plan) -> RunDirectory:
    """A whole run, with everything that a run directory can hold."""
    run = RunDirectory(tmp_path / "demo-two-sites")
    run.path.mkdir()
    plan.save(run.plan)
    run.topology.write_text(TOPOLOGY, encoding="utf-8")
    write_steps(run, range(NUM_STEPS), plan.workers)
    write_timelines(run, topology, range(0, NUM_STEPS, 20))
    play(topology).save(run.predicted)
    run.network.write_text(network_record(topology).model_dump_json(), encoding="utf-8")
    config = {"name": "demo", "training": {"steps": NUM_STEPS, "note": "<b>bold</b>"}, "data": {"source": "stdlib"}}
    run.config.write_text(json.dumps(config), encoding="utf-8")
    summary = {
        "steps": NUM_STEPS,
        "seconds": 41.7,
        "tokens_per_s": 6012.3,
        "validation_loss": 1.579,
        "trigram_loss": 1.907,
        "parameters": 4_310_000,
        "workers": 4,
        "machine": "x86_64, 2 cores",
        "torch": "2.13.0+cpu",
        "commit": "abc1234",
        "interrupted": False,
    }
    run.summary.write_text(json.dumps(summary), encoding="utf-8")
    return run


@pytest.fixture
def write_more_steps(finished_run: RunDirectory, plan: Plan) -> Callable[..., None]:
    """Append further steps to the finished run: `write_more_steps(range(60, 80), shift_s=3600.0)`."""
    return lambda steps, shift_s: write_steps(finished_run, steps, plan.workers, shift_s)
