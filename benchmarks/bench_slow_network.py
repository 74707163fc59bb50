"""What a hundred times slower network costs: a plan for 64 V100s around the world, against plans in a data centre.

The question that DT-FM's paper opens with, asked of the scheduler here: its worldwide network (case 5) and its data
centre (case 1), GPT-3 XL's shape with 24, 32 and 40 layers, batches of 1024 and 4096. Steps are simulated; the speed of
a V100 is the one that `bench_published` fits on their runs in the data centre. Activations are recomputed (a backward
takes three forwards), Adam's states and its step are counted, memory is 16 GB a worker.

    independent   every pair has its listed rate, a worker sends and receives 10 Gbit/s in all
    shared        a worker has 2 Gbit/s for all peers and both directions: 1 Gbit/s each way

    raw           bf16 for activations and gradients
    compressed    what holds for data seen once: 4 bits rotated forwards, 8 backwards; gradients 4, errors fed back

    python benchmarks/bench_slow_network.py            all; about ten minutes on one core
    python benchmarks/bench_slow_network.py --layers 24 --batch 1024 --save
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from bench_published import (
    HIDDEN,
    LAYER_FLOPS,
    PAYLOAD_BYTES,
    SEQ_LEN,
    Case,
    central_s,
    fit_flops_per_s,
    load_cases,
)
from harness import append_result
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology
from wantrain.units import parse_bytes, parse_bytes_per_s

CODECS = {
    "raw": {"forward_codec": "raw:bf16", "backward_codec": "raw:bf16", "gradient_codec": "raw:bf16"},
    "compressed": {
        "forward_codec": "hadamard:4",
        "backward_codec": "quantized:8",
        "gradient_codec": "error_feedback:quantized:4",
    },
}

READINGS = {"independent": "10 Gbit/s", "shared": "1 Gbit/s"}
"""What a worker sends, and what it receives, in all."""


def profile(num_layers: int) -> ModelProfile:
    """Return GPT-3 XL's layers with recomputation: only a layer's input is kept."""
    layer = LayerProfile(
        name="block", forward_flops=LAYER_FLOPS, backward_flops=3 * LAYER_FLOPS, parameter_bytes=4 * 12 * HIDDEN**2,
        activation_elements=SEQ_LEN * HIDDEN, stored_bytes=PAYLOAD_BYTES,
    )  # fmt: skip
    return ModelProfile(microbatch_size=1, layers=(layer,) * num_layers)


def network(case: Case, flops_per_s: float, rate: str) -> Topology:
    """Return a case's network, its workers with a V100's speed and memory and lines of one rate."""
    known = {"flops_per_s": flops_per_s, "memory_bytes": parse_bytes("16 GB")}
    lines = {f"{way}_bytes_per_s": parse_bytes_per_s(rate) for way in ("uplink", "downlink")}
    workers = tuple(worker.model_copy(update=known | lines) for worker in case.topology.workers)
    return case.topology.model_copy(update={"workers": workers})


def planned(topology: Topology, num_layers: int, batch: int, codecs: str) -> Plan:
    """Return the best plan found."""
    return make_plan(topology, profile(num_layers), batch_size=batch, **CODECS[codecs])  # type: ignore[arg-type]


def run(layers: list[int], batches: list[int]) -> list[dict[str, Any]]:
    """Plan all, print a table, return its rows."""
    cases = {case.name: case for case in load_cases()}
    flops_per_s = fit_flops_per_s(cases["case1"], central_s)
    print(f"a V100 as fitted in the data centre: {flops_per_s / 1e12:.1f} TFLOP/s")
    rows = []
    for num_layers in layers:
        for batch in batches:
            published = cases["case1"].measured["scheduled"][f"L{num_layers} B{batch}"]
            centre = planned(network(cases["case1"], flops_per_s, "1 Tbit/s"), num_layers, batch, "raw")
            row: dict[str, Any] = {"layers": num_layers, "batch": batch}
            row |= {"their_data_centre_s": statistics.fmean(published), "data_centre_s": _step_s(centre)}
            print(
                f"{num_layers} layers, batch {batch}: in the data centre {row['their_data_centre_s']:.1f} s theirs,"
                f" {row['data_centre_s']:.1f} s planned here ({_shape(centre)})"
            )
            for reading, rate in READINGS.items():
                there = network(cases["case5"], flops_per_s, rate)
                for codecs in CODECS:
                    began = time.perf_counter()
                    plan = planned(there, num_layers, batch, codecs)
                    took_s = time.perf_counter() - began
                    seconds = _step_s(plan)
                    row[f"{reading} {codecs}"] = {"step_s": seconds, "shape": _shape(plan), "planning_s": took_s}
                    theirs, ours = (seconds / row[name] for name in ("their_data_centre_s", "data_centre_s"))
                    times = f"{seconds:6.1f} s, {theirs:.2f}× theirs, {ours:.2f}× ours"
                    print(
                        f"    {reading:<12}{codecs:<11}{times} ({_shape(plan)}, planned in {took_s:.0f} s)", flush=True
                    )
            rows.append(row)
    return rows


def _step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def _shape(plan: Plan) -> str:
    return f"{plan.num_stages} stages × {len(plan.replicas)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 32, 40], choices=[24, 32, 40])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], choices=[1024, 2048, 4096])
    parser.add_argument("--save", action="store_true", help="keep the results")
    args = parser.parse_args()
    for row in run(args.layers, args.batch):
        if args.save:
            append_result("slow_network", {"benchmark": "slow_network", "emulated": "nothing: simulated"} | row)


if __name__ == "__main__":
    main()
