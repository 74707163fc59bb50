from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plays import payload

from wantrain.errors import PlanError, TopologyError
from wantrain.plan import Plan
from wantrain.scheduler.simulator import Workload, simulate, step_s
from wantrain.timeline import Timeline
from wantrain.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
GPT2_XL_BYTES = 1024 * 1600 * 4


def make_topology(workers: int, uplink: str, latency: str = "0 ms") -> Topology:
    return Topology.parse(
        {
            "name": "flat",
            "worker": [{"name": f"w{i}", "site": "s", "uplink": payload(uplink)} for i in range(workers)],
            "link": [{"within": "s", "bandwidth": "100 Gbit/s", "latency": latency}],
        },
        TopologyError,
        "flat",
    )


def make_plan(stages: int, replicas: int, microbatches: int, depths: list[int]) -> Plan:
    return Plan.parse(
        {
            "topology": "flat",
            "model": "m",
            "num_layers": stages,
            "batch_size": microbatches * replicas,
            "microbatch_size": 1,
            "num_lanes": replicas,
            "schedule": "1f1b",
            "stages": [{"first_layer": s, "end_layer": s + 1, "max_in_flight": depths[s]} for s in range(stages)],
            "replicas": [
                {
                    "workers": [f"w{r * stages + s}" for s in range(stages)],
                    "num_microbatches": microbatches,
                    "lanes": [r],
                }
                for r in range(replicas)
            ],
            "boundaries": [{"transports": [{}] * replicas} for _ in range(stages - 1)],
        },
        PlanError,
        "plan",
    )


def play(stages: int, microbatches: int, uplink: str, depths: list[int], **changes: Any) -> Timeline:
    replicas = changes.get("replicas", 1)
    ranks, size = stages * replicas, changes.get("num_bytes", GPT2_XL_BYTES)
    workload = Workload(
        forward_s=(0.031,) * ranks,
        backward_s=(0.062,) * ranks,
        step_s=(0.0,) * ranks,
        forward_bytes=(size,) * (stages - 1) + (0,),
        backward_bytes=(0,) + (size,) * (stages - 1),
        bucket_bytes=(changes.get("buckets", ()),) * stages,
    )
    topology = make_topology(ranks, uplink, changes.get("latency", "0 ms"))
    return simulate(make_plan(stages, replicas, microbatches, depths), topology, workload)


@pytest.mark.parametrize(("uplink", "bound_s"), [("10 Gbit/s", 2.21), ("500 Mbit/s", 5.10), ("100 Mbit/s", 23.13)])
def test_a_deep_1f1b_reaches_the_work_conserving_bound_and_never_beats_it(uplink: str, bound_s: float) -> None:
    """Bounds of the same shape with unlimited depth, computed apart: 8 stages, 16 microbatches, shared uplinks."""
    timeline = play(8, 16, uplink, [min(16, 3 * (8 - stage)) for stage in range(8)])
    assert bound_s * 0.998 <= timeline.span_s <= bound_s * 1.01


def test_with_a_free_network_1f1b_takes_the_ideal_time() -> None:
    timeline = play(4, 8, "10 Gbit/s", [4, 3, 2, 1], num_bytes=1)
    assert timeline.span_s == pytest.approx((8 + 3) * 0.093, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(20, 900), st.integers(1, 3))
def test_more_bandwidth_is_never_slower(stages: int, microbatches: int, rate: int, factor: int) -> None:
    depths = [factor * (stages - stage) for stage in range(stages)]
    slow = play(stages, microbatches, f"{rate} Mbit/s", depths).span_s
    fast = play(stages, microbatches, f"{rate * 1.5} Mbit/s", depths).span_s
    assert fast <= slow + 1e-9


def test_latency_is_paid_once_each_way_by_a_single_microbatch() -> None:
    there_and_back = play(2, 1, "10 Gbit/s", [2, 1], latency="50 ms", num_bytes=1).span_s
    assert there_and_back == pytest.approx(2 * 0.093 + 2 * 0.05, rel=1e-3)


def test_gradients_travel_scatter_and_gather_and_overlap_the_last_backward() -> None:
    buckets = (1_000_000,) * 4
    alone = play(1, 2, "100 Mbit/s", [1], replicas=1, buckets=buckets).span_s
    shared = play(1, 2, "100 Mbit/s", [1], replicas=2, buckets=buckets)
    wire_s = 4 * 1_000_000 / 12.5e6
    assert alone == pytest.approx(2 * 0.093)
    assert alone + wire_s - 0.062 <= shared.span_s <= alone + wire_s
    assert shared.bytes_by_link() == {("w0", "w1"): 4_000_000, ("w1", "w0"): 4_000_000}


def test_replicas_with_other_numbers_of_microbatches_meet_at_the_reduction() -> None:
    plan = make_plan(1, 2, 2, [1])
    uneven = plan.replicas[0].model_copy(update={"num_microbatches": 4})
    plan = plan.model_copy(update={"replicas": (uneven, plan.replicas[1])})
    workload = Workload((0.01,) * 2, (0.02,) * 2, (0.0,) * 2, (0,), (0,), ((1000,),))
    timeline = simulate(plan, make_topology(2, "1 Gbit/s"), workload)
    assert timeline.span_s == pytest.approx(4 * 0.03, rel=1e-2)


def big(stages: int, replicas: int) -> tuple[Plan, Topology, Workload]:
    """A step with 64 microbatches and four gradient buckets a stage."""
    ranks = stages * replicas
    workload = Workload(
        forward_s=(0.031,) * ranks,
        backward_s=(0.062,) * ranks,
        step_s=(0.0,) * ranks,
        forward_bytes=(GPT2_XL_BYTES,) * (stages - 1) + (0,),
        backward_bytes=(0,) + (GPT2_XL_BYTES,) * (stages - 1),
        bucket_bytes=((4_000_000,) * 4,) * stages,
    )
    depths = [min(64, 2 * (stages - stage)) for stage in range(stages)]
    return make_plan(stages, replicas, 64, depths), make_topology(ranks, "1 Gbit/s"), workload


def fastest_s(do: Callable[[], object]) -> float:
    """Return the least processor time of three runs, the first of which may have to compile."""
    do()
    spent = []
    for _ in range(3):
        began = time.process_time()
        do()
        spent.append(time.process_time() - began)
    return min(spent)


def test_64_workers_with_64_microbatches_play_fast_enough_to_search_with() -> None:
    """Measured on a quiet core: 20 ms, 45 ms with the list of events; the bounds leave room for a busy one."""
    plan, topology, workload = big(8, 8)
    assert fastest_s(lambda: step_s(plan, topology, workload)) < 0.15
    assert fastest_s(lambda: simulate(plan, topology, workload)) < 0.3


@pytest.mark.slow
def test_1024_workers_play_within_seconds() -> None:
    plan, topology, workload = big(16, 64)
    assert fastest_s(lambda: step_s(plan, topology, workload)) < 2.0


def test_the_step_is_as_long_as_its_timeline() -> None:
    plan, topology, workload = big(2, 2)
    assert step_s(plan, topology, workload) == simulate(plan, topology, workload).span_s


def test_a_small_plan_is_played_without_numba() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests/scheduler', '.']; from plays import flat, make_plan, work;"
        "from wantrain.scheduler.simulator import simulate;"
        "plan = make_plan(4, 2, 32); simulate(plan, flat(8), work(plan)); sys.exit('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_events_are_those_of_the_plan_and_sorted_by_start() -> None:
    timeline = play(2, 3, "1 Gbit/s", [2, 1], replicas=2, buckets=(1000,))
    starts = [event.start_s for event in timeline.events]
    assert starts == sorted(starts)
    counts = Counter((event.rank, event.kind) for event in timeline.events)
    assert {counts[rank, kind] for rank in range(4) for kind in ("forward", "backward")} == {3}
    assert {counts[rank, "send"] for rank in range(4)} == {3 + 2}
    assert sum(event.num_bytes for event in timeline.events) == 12 * GPT2_XL_BYTES + 8 * 500
