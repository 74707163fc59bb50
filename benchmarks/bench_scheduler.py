"""How good and how fast the scheduler is.

    python benchmarks/bench_scheduler.py --dtfm            DT-FM's own objective on its own scenarios
    python benchmarks/bench_scheduler.py --quality 200     gap to the exact optimum on random cases of up to 8 workers
    python benchmarks/bench_scheduler.py --replan 50       a link degraded or a worker gone, against planning afresh
    python benchmarks/bench_scheduler.py --scale           64, 256 and 1024 workers: seconds, memory, gain

`--save` keeps the results. Seconds are of the processor: other work on the machine doesn't count. The first call of a
loop compiles it, which is kept on disk; `--dtfm` and `--scale` say what that took.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import resource
import statistics
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import append_result
from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import ModelProfile, gpt_profile
from wantrain.scheduler import dtfm
from wantrain.scheduler.exact import Exact, exact_plan
from wantrain.scheduler.replan import replan
from wantrain.scheduler.solve import find_plan, make_plan, naive_plan
from wantrain.topology import Topology

PUBLISHED = Path(__file__).resolve().parent / "published"

SCENARIOS = {
    "sched_case0": ("data centre", 3.4398, 3.4398),
    "sched_case1": ("spot", 43.55, 31.634),
    "sched_case2": ("multi-DC", 16.087, 16.087),
    "sched_case3": ("regional", 34.802, 34.802),
    "sched_case4": ("worldwide", 49.218, 49.218),
}
"""By scenario: its name, the best cost of DT-FM's own solver in three runs of five minutes and more, the best known."""

STAGING_BYTES = 150_000_000
"""Of the channels, which fast long links need, whatever the model."""

ROUNDING = 5e-4
"""The best known costs are given to so much."""


def load_scenario(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return delays in seconds and rates in Gbit/s, for every pair of devices."""
    data = tomllib.loads((PUBLISHED / f"{name}.toml").read_text(encoding="utf-8"))
    regions = [region for region, count in data["devices"] for _ in range(count)]
    links = {(a, b): (delay / 1e3, rate) for x, y, delay, rate in data["links"] for a, b in ((x, y), (y, x))}
    figures = np.array([[links.get((a, b), (0.0, 1.0)) for b in regions] for a in regions])
    return figures[:, :, 0], figures[:, :, 1]


def run_dtfm() -> list[dict[str, Any]]:
    """Solve every scenario twice; print and return costs and seconds."""
    rows = []
    print(f"{'scenario':<14}{'theirs':>10}{'best known':>12}{'here':>10}{'cold s':>9}{'warm s':>9}")
    for name, (title, theirs, known) in SCENARIOS.items():
        delay_s, rate = load_scenario(name)
        seconds = []
        for _ in range(2):
            began = time.process_time()
            found = dtfm.solve(delay_s, rate, 8, 8)
            seconds.append(time.process_time() - began)
        print(f"{title:<14}{theirs:>10}{known:>12}{found.cost:>10.4f}{seconds[0]:>9.2f}{seconds[1]:>9.2f}")
        rows.append({"scenario": name, "cost": found.cost, "best_known": known, "processor_s": seconds})
    return rows


def random_case(generator: random.Random, number: int) -> dict[str, Any]:
    """Draw a case: up to 8 workers (every other one has 7 or 8), rates, speeds and, in a third, memory that binds."""
    workers = generator.choice((7, 8)) if number % 2 else generator.randint(3, 6)
    shapes = [(s, r) for s in range(1, 9) for r in range(1, 5) if max(2, workers - 1) <= s * r <= workers]
    stages, replicas = generator.choice(shapes)
    model = ModelConfig(
        num_layers=max(4, stages - 1),
        hidden=generator.choice((256, 512)),
        num_heads=4,
        seq_len=256,
        vocab_size=1024,
    )
    profile = gpt_profile(model, 1)
    depths = [2 * (stages - stage) for stage in range(stages)]
    stored = sum(layer.stored_bytes for layer in profile.layers)
    need = (4 * profile.parameter_bytes + depths[0] * stored) / stages
    memory = [need * generator.uniform(0.8, 2.0) + STAGING_BYTES if number % 3 == 0 else 1e12 for _ in range(workers)]
    return {
        "topology": _random_topology(generator, memory),
        "profile": profile,
        "batch_size": 6 * replicas,
        "num_stages": stages,
        "num_replicas": replicas,
        "max_in_flight": depths,
    }


def _random_topology(generator: random.Random, memory: list[float]) -> Topology:
    names = [f"w{i}" for i in range(len(memory))]

    def log_uniform(low: float, high: float) -> float:
        return math.exp(generator.uniform(math.log(low), math.log(high)))

    return Topology.parse(
        {
            "name": "random",
            "worker": [
                {"name": name, "site": name, "memory": f"{size} B", "flops": f"{log_uniform(1e11, 4e11)} FLOP/s"}
                for name, size in zip(names, memory, strict=True)
            ],
            "link": [
                {
                    "between": [a, b],
                    "bandwidth": f"{log_uniform(50, 10_000)} Mbit/s",
                    "latency": f"{log_uniform(0.5, 50)} ms",
                }
                for a, b in itertools.combinations(names, 2)
            ],
        },
        TopologyError,
        "random",
    )


def step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def gaps(case: dict[str, Any]) -> tuple[float, float | None, Exact] | None:
    """Return by how much the found and the naive plan are slower than the best; None where nothing fits."""
    topology, profile = case.pop("topology"), case.pop("profile")
    try:
        exact = exact_plan(topology, profile, **case)
    except PlanError:
        return None
    found = step_s(make_plan(topology, profile, num_lanes=case["num_replicas"], **case)) / exact.step_s - 1
    try:
        naive = step_s(naive_plan(topology, profile, num_lanes=case["num_replicas"], **case)) / exact.step_s - 1
    except PlanError:
        return found, None, exact
    return found, naive, exact


def run_quality(num_cases: int, seed: int) -> dict[str, Any]:
    """Hold the search against the exact optimum; print and return the gaps."""
    generator = random.Random(seed)
    found: list[float] = []
    naive: list[float] = []
    for number in itertools.count():
        if len(found) == num_cases:
            break
        case = random_case(generator, number)
        shape = (len(case["topology"].workers), case["num_stages"], case["num_replicas"])
        began = time.process_time()
        result = gaps(case)
        if result is None:
            continue
        found.append(result[0])
        naive += [] if result[1] is None else [result[1]]
        if result[0] > 0.005:
            took = time.process_time() - began
            print(f"case {number} {shape}: {100 * result[0]:.2f} % off, {took:.1f} s, {result[2].num_played} played")
    record = {
        "cases": num_cases,
        "mean_gap": statistics.mean(found),
        "worst_gap": max(found),
        "optimal": sum(gap < 1e-6 for gap in found) / num_cases,
        "naive_mean_gap": statistics.mean(naive),
    }
    print({name: round(value, 4) for name, value in record.items()})
    return record


def run_replan(num_cases: int, seed: int) -> dict[str, Any]:
    """Degrade a link between neighbours tenfold, or take a worker where one is to spare; hold replan against find_plan.

    Prints and returns how much longer the new plan's step is than a fresh plan's, and the bytes that each moves.
    """
    generator = random.Random(seed)
    longer: list[float] = []
    moved = fresh_moved = gone = 0
    for number in itertools.count():
        if len(longer) == num_cases:
            break
        case = random_case(generator, number)
        topology, profile = case.pop("topology"), case.pop("profile")
        case["num_lanes"] = case["num_replicas"]
        try:
            old = make_plan(topology, profile, **case)
            changed = _without_a_worker(topology, old, generator) or _degraded(topology, old, generator)
            found = replan(old, changed, profile, **case)
        except PlanError:
            continue
        longer.append(step_s(found.plan) / step_s(found.fresh) - 1)
        moved, fresh_moved = moved + found.moved_bytes, fresh_moved + found.fresh_moved_bytes
        gone += len(changed.workers) < len(topology.workers)
    record = {
        "cases": num_cases, "worker_gone": gone, "worst_longer": max(longer), "mean_longer": statistics.mean(longer),
        "moved_bytes": moved, "fresh_moved_bytes": fresh_moved,
    }  # fmt: skip
    print({name: round(value, 4) for name, value in record.items()})
    return record


def _without_a_worker(topology: Topology, plan: Plan, generator: random.Random) -> Topology | None:
    """Return the topology without one of the plan's workers; None where all are needed."""
    if len(topology.workers) == plan.world_size:
        return None
    gone = generator.choice(plan.workers)
    return topology.model_copy(update={"workers": tuple(one for one in topology.workers if one.name != gone)})


def _degraded(topology: Topology, plan: Plan, generator: random.Random) -> Topology:
    """Return the topology with a tenth of the rate between two of the plan's ranks that follow each other."""
    at = generator.randrange(plan.world_size - 1)
    here, there = plan.workers[at : at + 2]
    changed = topology.with_link(here, there)
    rate = changed.rules[-1].bandwidth_bytes_per_s
    return topology.with_link(here, there, bandwidth_bytes_per_s=rate / 10)


def scattered_topology(num_workers: int, num_sites: int, seed: int = 0) -> Topology:
    """Return volunteers of four speeds and four sizes of memory, in the order in which they came, over some sites."""
    generator = random.Random(seed)
    sites = [f"site-{i}" for i in range(num_sites)]
    places = [(generator.random(), generator.random()) for _ in sites]
    workers = [
        {
            "name": f"w{i}",
            "site": sites[i] if i < num_sites else generator.choice(sites),
            "flops": f"{generator.choice((10, 20, 30, 40))} TFLOP/s",
            "memory": f"{generator.choice((24, 32, 48, 80))} GB",
        }
        for i in range(num_workers)
    ]
    links: list[dict[str, Any]] = [{"within": site, "bandwidth": "10 Gbit/s", "latency": "0.5 ms"} for site in sites]
    for a, b in itertools.combinations(range(num_sites), 2):
        far = math.dist(places[a], places[b])
        rate = 300 + 1200 * (1 - far / 1.5) * generator.random()
        links.append(
            {"between": [sites[a], sites[b]], "bandwidth": f"{rate:.0f} Mbit/s", "latency": f"{2 + 100 * far:.1f} ms"}
        )
    data = {"name": f"scattered-{num_workers}", "worker": workers, "link": links}
    return Topology.parse(data, TopologyError, "scattered")


def large_profile() -> ModelProfile:
    """Return GPT-3 XL's shape (Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1)."""
    return gpt_profile(ModelConfig(num_layers=24, hidden=2048, num_heads=16, seq_len=2048, vocab_size=50257), 1)


def run_scale(sizes: list[int]) -> list[dict[str, Any]]:
    """Plan for many workers; print and return seconds, memory and what the plan is held against."""
    rows = []
    for num_workers in sizes:
        topology = scattered_topology(num_workers, {64: 8, 256: 16}.get(num_workers, 30))
        began, wall = time.process_time(), time.perf_counter()
        search = find_plan(topology, large_profile(), batch_size=8 * num_workers)
        row: dict[str, Any] = {
            "workers": num_workers,
            "processor_s": round(time.process_time() - began, 2),
            "wall_s": round(time.perf_counter() - wall, 2),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "shape": [search.plan.num_stages, len(search.plan.replicas)],
            "step_s": step_s(search.plan),
            "naive_s": None if search.naive is None else step_s(search.naive),
            "together_s": None if search.together is None else step_s(search.together),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtfm", action="store_true")
    parser.add_argument("--quality", type=int, metavar="CASES")
    parser.add_argument("--replan", type=int, metavar="CASES")
    parser.add_argument("--scale", type=int, nargs="*", metavar="WORKERS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    if arguments.dtfm:
        record["dtfm"] = run_dtfm()
    if arguments.quality:
        record["quality"] = run_quality(arguments.quality, arguments.seed)
    if arguments.replan:
        record["replan"] = run_replan(arguments.replan, arguments.seed)
    if arguments.scale is not None:
        record["scale"] = run_scale(arguments.scale or [64, 256, 1024])
    if arguments.save:
        append_result("scheduler", record)


if __name__ == "__main__":
    main()
