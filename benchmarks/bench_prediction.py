"""Does a plan's prediction hold? Whole jobs on the emulated WAN, each predicted before it runs.

Layers sleep for their profiled seconds (`EmulatedLayer`); pipeline, codecs, gradient reduction, optimizer and network
are the real ones. Everything a prediction starts from is in the case: seconds of layers, rates and latencies of links,
speeds of workers; how fast this machine encodes is measured by the profiler before the first run. The prediction is
written to the results before a run begins, the measured step beside it afterwards.

    python benchmarks/bench_prediction.py                 all cases; about twenty minutes on two cores
    python benchmarks/bench_prediction.py --only gpipe    those with a word in their name
    python benchmarks/bench_prediction.py --list          the predictions alone

The step is the median of rank 0's steps without the first two, undilated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import append_result
from wantrain.errors import TopologyError
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile
from wantrain.scheduler.cost_model import predict
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology
from wantrain.units import format_time

SPEED = 1e12
"""Operations per second of a worker of speed 1; layers are profiled in seconds on such a one."""

_MASTER_PORT = 29500
_SHOWN_WITHIN = 0.05


@dataclass(frozen=True)
class Case:
    """One job. `shape` is a sample's activation; speeds are by worker, 1 where not given."""

    name: str
    stages: int
    replicas: int
    links: str
    """Of the topologies below."""
    forward: str = "raw:fp32"
    backward: str = "raw:fp32"
    gradients: str = "raw:fp32"
    schedule: str = "1f1b"
    microbatches: int = 8
    """Of one sample, per replica."""
    num_layers: int = 8
    shape: tuple[int, int] = (256, 512)
    layer_s: float = 0.02
    """Of a layer's forward; its backward takes twice that."""
    parameters: int = 500_000
    """Of a layer."""
    speeds: tuple[float, ...] = ()
    dilation: float = 4.0


LINKS: dict[str, dict[str, Any]] = {
    "1g": {"rate": "1 Gbit/s", "latency": "1 ms"},
    "500m": {"rate": "500 Mbit/s", "latency": "5 ms"},
    "200m": {"rate": "200 Mbit/s", "latency": "10 ms"},
    "100m": {"rate": "100 Mbit/s", "latency": "20 ms"},
    "50m": {"rate": "50 Mbit/s", "latency": "20 ms"},
    "uplink100m": {"rate": "500 Mbit/s", "latency": "5 ms", "uplink": "100 Mbit/s"},
    "two sites": {"rate": "1 Gbit/s", "latency": "1 ms", "between": "100 Mbit/s", "apart": "30 ms"},
}

CASES = (
    Case("2 stages, fast", 2, 1, "1g"),
    Case("4 stages, fast", 4, 1, "1g"),
    Case("4 stages, 500m", 4, 1, "500m"),
    Case("4 stages, 200m", 4, 1, "200m"),
    Case("4 stages, 100m", 4, 1, "100m"),
    Case("2 stages, 50m", 2, 1, "50m"),
    Case("8 stages, 500m", 8, 1, "500m", microbatches=16),
    Case("8 stages, 100m, 4 bits", 8, 1, "100m", forward="quantized:4", backward="quantized:4", microbatches=16),
    Case("4 stages, 100m, 8 bits", 4, 1, "100m", forward="quantized:8", backward="quantized:8"),
    Case("4 stages, 50m, fw3 bw6", 4, 1, "50m", forward="quantized:3", backward="quantized:6"),
    Case("4 stages, 50m, hadamard", 4, 1, "50m", forward="hadamard:4", backward="hadamard:4"),
    Case("4 stages, 100m, aqsgd", 4, 1, "100m", forward="aqsgd:4", backward="quantized:8"),
    Case("4 stages, gpipe, 200m", 4, 1, "200m", schedule="gpipe"),
    Case("4 stages, gpipe, 100m", 4, 1, "100m", schedule="gpipe"),
    Case("2 stages, gpipe, 50m, bf16", 2, 1, "50m", forward="raw:bf16", backward="raw:bf16", schedule="gpipe"),
    Case("4 stages, shared uplinks", 4, 1, "uplink100m"),
    Case("4 stages, shared uplinks, 4 bits", 4, 1, "uplink100m", forward="quantized:4", backward="quantized:4"),
    Case("2 replicas, 100m", 1, 2, "100m", num_layers=4),
    Case("4 replicas, 200m", 1, 4, "200m", num_layers=4),
    Case("4 replicas, 100m, 4 bits", 1, 4, "100m", gradients="error_feedback:quantized:4", num_layers=4),
    Case("2 × 2, 200m", 2, 2, "200m"),
    Case("2 × 2, 100m", 2, 2, "100m"),
    Case("2 × 2, 50m, compressed", 2, 2, "50m", "quantized:4", "quantized:8", "error_feedback:quantized:4"),
    Case("2 × 2, two sites", 2, 2, "two sites"),
    Case("4 × 2, two sites, 8 bits", 4, 2, "two sites", "quantized:8", "quantized:8", "quantized:8"),
    Case("4 stages, uneven workers", 4, 1, "200m", speeds=(1.0, 0.5, 2.0, 1.0)),
    Case("2 × 2, uneven workers", 2, 2, "100m", speeds=(1.0, 0.6, 1.0, 0.6)),
    Case("8 uneven, two sites, 4 bits", 4, 2, "two sites", "quantized:4", "quantized:4", "quantized:4",
         speeds=(1.0, 0.5, 1.0, 0.5, 2.0, 1.0, 2.0, 1.0)),
)  # fmt: skip


def topology_of(case: Case, codec_speed: float) -> Topology:
    """Return the case's network. Codecs work undilated: beside everything that is slowed they seem as much faster."""
    count, given = case.stages * case.replicas, LINKS[case.links]
    speeds = case.speeds or (1.0,) * count
    is_split = "between" in given
    workers = [
        {
            "name": f"w-{i}",
            "site": "west" if is_split and i >= count // 2 else "east",
            "flops": f"{speeds[i] * SPEED} FLOP/s",
            "codec_speed": codec_speed * case.dilation,
            **({"uplink": given["uplink"]} if "uplink" in given else {}),
        }
        for i in range(count)
    ]
    links = [{"within": "east", "bandwidth": given["rate"], "latency": given["latency"]}]
    if is_split:
        links.append(links[0] | {"within": "west"})
        links.append({"between": ["east", "west"], "bandwidth": given["between"], "latency": given["apart"]})
    return Topology.parse({"name": case.links, "worker": workers, "link": links}, TopologyError, case.name)


def profile_of(case: Case) -> ModelProfile:
    """Return what the case's layers cost: what they will sleep."""
    values = case.shape[0] * case.shape[1]
    layer = LayerProfile(
        name="layer", forward_flops=case.layer_s * SPEED, backward_flops=2 * case.layer_s * SPEED,
        parameter_bytes=4 * case.parameters, activation_elements=values, stored_bytes=4 * values,
    )  # fmt: skip
    return ModelProfile(microbatch_size=1, layers=(layer,) * case.num_layers)


def plan_of(case: Case, topology: Topology) -> Plan:
    return make_plan(
        topology, profile_of(case), batch_size=case.microbatches * case.replicas, num_stages=case.stages,
        num_replicas=case.replicas, num_lanes=2 * case.replicas, forward_codec=case.forward,
        backward_codec=case.backward, gradient_codec=case.gradients, schedule=case.schedule,  # type: ignore[arg-type]
    )  # fmt: skip


def work(job: dict[str, Any]) -> None:
    """Be one worker: train emulated layers, print the steps on rank 0."""
    import torch

    from wantrain.models.emulated import EmulatedLayer, emulated_loss
    from wantrain.pipeline.boundary_codecs import CodecSettings
    from wantrain.training.trainer import Batch, Trainer

    torch.set_num_threads(1)
    case, plan = Case(**job["case"]), Plan.model_validate(job["plan"])
    worker = os.environ["WANTRAIN_WORKER"]
    speed = job["speeds"][worker]
    seconds = case.dilation * case.layer_s / speed

    def layers(first: int, end: int) -> list[EmulatedLayer]:
        return [EmulatedLayer(tuple(case.shape), seconds, 2 * seconds, case.parameters) for _ in range(first, end)]

    trainer = Trainer(
        layers, plan, loss=emulated_loss, worker=worker, dilation=case.dilation, layers_are_dilated=True,
        timeout_s=300.0, codec_settings=CodecSettings(sample_shape=tuple(case.shape)),
    )  # fmt: skip
    per_lane = plan.batch_size // plan.num_lanes
    own = [lane * per_lane + i for lane in plan.replicas[trainer.replica].lanes for i in range(per_lane)]
    batch = Batch(own, torch.zeros(len(own), 1, dtype=torch.int64), torch.zeros(len(own), 1, dtype=torch.int64))
    steps = []
    for _ in range(job["steps"]):
        trainer.step(batch, own)
        steps.append(trainer.step_s)
    trainer.close()
    if trainer.rank == 0:
        print(json.dumps(steps), flush=True)


def inside(job_file: Path) -> None:
    """Inside the sandbox: build the network, start a process for each worker of the plan, hand on rank 0's steps."""
    from wantrain.netem.emulate import EmulatedNetwork
    from wantrain.netem.program import worker_environment

    job = json.loads(job_file.read_text())
    case, plan = Case(**job["case"]), Plan.model_validate(job["plan"])
    with EmulatedNetwork(topology_of(case, 1e9), case.dilation) as network:
        processes = []
        for rank, name in enumerate(plan.workers):
            env = worker_environment(network, name) | {
                "RANK": str(rank), "WORLD_SIZE": str(plan.world_size), "MASTER_PORT": str(_MASTER_PORT),
                "MASTER_ADDR": network.address(plan.workers[0]), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            argv = [sys.executable, str(Path(__file__).resolve()), "--work", str(job_file)]
            processes.append(network.popen(name, argv, env=env))
        statuses = [process.wait() for process in processes]
    sys.exit(max(statuses))


def measure(case: Case, plan: Plan, topology: Topology, steps: int) -> list[float]:
    """Run a case; return rank 0's seconds of each step, undilated."""
    speeds = {worker.name: worker.flops_per_s / SPEED for worker in topology.workers}
    job = {"case": asdict(case), "plan": plan.model_dump(mode="json"), "speeds": speeds, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder, "job.json")
        job_file.write_text(json.dumps(job))
        argv = [sys.executable, "-m", "wantrain.netem.sandbox", "--", sys.executable, str(Path(__file__).resolve())]
        done = subprocess.run([*argv, "--inside", str(job_file)], stdout=subprocess.PIPE, text=True, check=True)
    seconds: list[float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return seconds


def codec_speed() -> float:
    """Return values per second that this machine's codecs get through, as `wantrain profile` measures them."""
    import torch

    from wantrain.training.codec_profiler import measure_codecs

    torch.set_num_threads(1)
    return measure_codecs(torch.device("cpu")).values_per_s


def predicted(cases: list[Case], speed: float) -> Iterator[tuple[Case, Topology, Plan]]:
    for case in cases:
        topology = topology_of(case, speed)
        yield case, topology, plan_of(case, topology)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--list", action="store_true", help="print the predictions and run nothing")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="keep no result")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work.read_text()))
    elif args.inside:
        inside(args.inside)
    else:
        run(args)


def run(args: argparse.Namespace) -> None:
    """Predict, run and compare."""
    speed = codec_speed()
    errors = []
    for case, topology, plan in predicted([case for case in CASES if args.only in case.name], speed):
        prediction, _ = predict(plan, topology, profile_of(case))
        exposed = prediction.exposed_communication_s / prediction.step_s
        said = f"{case.name:<34} predicted {format_time(prediction.step_s):>8}, not hidden {exposed:4.0%}"
        if args.list:
            print(said)
            continue
        if not args.smoke:
            append_result("prediction", _record(case, plan, speed, exposed))
        steps = measure(case, plan, topology, args.steps)
        measured_s = statistics.median(steps[2:])
        error = prediction.step_s / measured_s - 1
        errors.append(abs(error))
        if not args.smoke:
            append_result("prediction", {"benchmark": "prediction", "case": case.name, "measured_s": steps})
        mark = "" if abs(error) <= _SHOWN_WITHIN else "  <"
        print(f"{said}   measured {format_time(measured_s):>8}   {error:+.1%}{mark}", flush=True)
    if errors:
        print(f"{len(errors)} runs: off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst")


def _record(case: Case, plan: Plan, speed: float, exposed: float) -> dict[str, Any]:
    assert plan.prediction is not None
    return {
        "benchmark": "prediction", "case": case.name, "asked": asdict(case), "codec_values_per_s": speed,
        "emulated": "compute and network", "predicted_s": plan.prediction.step_s, "exposed_share": exposed,
    }  # fmt: skip


if __name__ == "__main__":
    main()
