"""Does a plan's prediction hold? Whole jobs on the emulated WAN, each predicted before it runs.

Layers and optimizer of most jobs sleep for their profiled seconds (`EmulatedLayer`), the others train a GPT; pipeline,
codecs, gradient reduction and network are the real ones in both. Everything a prediction starts from is in the case or
is measured by `wantrain profile`'s own functions right before: seconds of real layers, how fast this machine encodes.
The prediction is written to the results before a run begins, the measured steps beside it afterwards.

    python benchmarks/bench_prediction.py                 all cases; about twenty minutes on two cores
    python benchmarks/bench_prediction.py --only gpipe    those with a word in their name
    python benchmarks/bench_prediction.py --go-on         those that the results don't hold yet
    python benchmarks/bench_prediction.py --list          the predictions alone
    python benchmarks/bench_prediction.py --stored        what is predicted now, against the stored runs

The step is the median of rank 0's steps without the first two, undilated. A run during which more than 5 % of the
processors' time went to other machines is repeated once; the one that lost less counts, both are kept.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from emulated_job import EmulatedJob, Measured
from emulated_job import run as run_job
from harness import append_result, read_results
from wantrain.errors import TopologyError
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile
from wantrain.scheduler.cost_model import predict
from wantrain.scheduler.solve import make_plan
from wantrain.timeline import COMPUTE_KINDS, Timeline
from wantrain.topology import Topology
from wantrain.units import format_time

SPEED = 1e12
"""Operations per second of a worker of speed 1; layers are profiled in seconds on such a one."""

_SHOWN_WITHIN = 0.05
_MOST_STOLEN, _MOST_RUNS = 0.05, 2

SMALL_GPT = ModelConfig(num_layers=6, hidden=128, num_heads=4, seq_len=128)


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
    layer_s: float = 0.01
    """Of a layer's forward; its backward takes twice that."""
    parameters: int = 500_000
    """Of a layer."""
    speeds: tuple[float, ...] = ()
    dilation: float = 4.0
    is_real: bool = False
    """Whether a small GPT is trained, four samples a microbatch, in place of layers that sleep."""


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
    Case("2 stages, 1g", 2, 1, "1g"),
    Case("4 stages, 1g", 4, 1, "1g"),
    Case("4 stages, 500m", 4, 1, "500m"),
    Case("4 stages, 200m", 4, 1, "200m"),
    Case("4 stages, 100m", 4, 1, "100m"),
    Case("2 stages, 50m", 2, 1, "50m"),
    Case("8 stages, 500m", 8, 1, "500m", microbatches=16, dilation=8),
    Case("8 stages, 100m, 4 bits", 8, 1, "100m", "quantized:4", "quantized:4", microbatches=16, dilation=8),
    Case("4 stages, 100m, 8 bits", 4, 1, "100m", "quantized:8", "quantized:8"),
    Case("4 stages, 50m, fw3 bw6", 4, 1, "50m", "quantized:3", "quantized:6"),
    Case("4 stages, 50m, hadamard", 4, 1, "50m", "hadamard:4", "hadamard:4"),
    Case("4 stages, 100m, aqsgd", 4, 1, "100m", "aqsgd:4", "quantized:8"),
    Case("4 stages, gpipe, 200m", 4, 1, "200m", schedule="gpipe"),
    Case("4 stages, gpipe, 100m", 4, 1, "100m", schedule="gpipe"),
    Case("2 stages, gpipe, 50m, bf16", 2, 1, "50m", "raw:bf16", "raw:bf16", schedule="gpipe"),
    Case("4 stages, zero bubble, 200m", 4, 1, "200m", schedule="zero_bubble"),
    Case("8 stages, zero bubble, 100m, 4 bits", 8, 1, "100m", "quantized:4", "quantized:4", microbatches=16,
         dilation=8, schedule="zero_bubble"),
    Case("4 stages, shared uplinks", 4, 1, "uplink100m"),
    Case("4 stages, shared uplinks, 4 bits", 4, 1, "uplink100m", "quantized:4", "quantized:4"),
    Case("2 replicas, 100m", 1, 2, "100m", num_layers=4),
    Case("4 replicas, 200m", 1, 4, "200m", num_layers=4),
    Case("4 replicas, 100m, 4 bits", 1, 4, "100m", gradients="error_feedback:quantized:4", num_layers=4),
    Case("2 × 2, 200m", 2, 2, "200m"),
    Case("2 × 2, 100m", 2, 2, "100m"),
    Case("2 × 2, 50m, compressed", 2, 2, "50m", "quantized:4", "quantized:8", "error_feedback:quantized:4"),
    Case("2 × 2, zero bubble, 200m", 2, 2, "200m", schedule="zero_bubble"),
    Case("2 × 2, two sites", 2, 2, "two sites"),
    Case("4 × 2, two sites, 8 bits", 4, 2, "two sites", "quantized:8", "quantized:8", "quantized:8", dilation=8),
    Case("4 stages, uneven workers", 4, 1, "200m", speeds=(1.0, 0.5, 2.0, 1.0)),
    Case("2 × 2, uneven workers", 2, 2, "100m", speeds=(1.0, 0.6, 1.0, 0.6)),
    Case("8 uneven, two sites, 4 bits", 4, 2, "two sites", "quantized:4", "quantized:4", "quantized:4",
         speeds=(1.0, 0.5, 1.0, 0.5, 2.0, 1.0, 2.0, 1.0), dilation=8),
    Case("GPT, 4 stages, 500m", 4, 1, "500m", dilation=16, is_real=True),
    Case("GPT, 4 stages, 50m", 4, 1, "50m", dilation=16, is_real=True),
    Case("GPT, 4 stages, 50m, 4 bits", 4, 1, "50m", "quantized:4", "quantized:4", dilation=16, is_real=True),
    Case("GPT, 2 × 2, 200m", 2, 2, "200m", dilation=16, is_real=True),
    Case("GPT, 4 stages, zero bubble, 500m", 4, 1, "500m", dilation=16, is_real=True, schedule="zero_bubble"),
)  # fmt: skip


def topology_of(case: Case, codec_speed: float, flops_per_s: float = SPEED) -> Topology:
    """Return the case's network, on workers whose speed 1 is `flops_per_s`.

    Codecs work undilated: beside everything that is slowed they seem as much faster.
    """
    count, given = case.stages * case.replicas, LINKS[case.links]
    speeds = case.speeds or (1.0,) * count
    is_split = "between" in given
    workers = [
        {
            "name": f"w-{i}",
            "site": "west" if is_split and i >= count // 2 else "east",
            "flops": f"{speeds[i] * flops_per_s} FLOP/s",
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
    """Return what the case's layers cost: what they will sleep, or what a GPT's take here, measured now."""
    if case.is_real:
        return _measured_profile(case.dilation)
    values = case.shape[0] * case.shape[1]
    layer = LayerProfile(
        name="layer", forward_flops=case.layer_s * SPEED, backward_flops=2 * case.layer_s * SPEED,
        weight_flops=case.layer_s * SPEED, parameter_bytes=4 * case.parameters, activation_elements=values,
        stored_bytes=4 * values,
    )  # fmt: skip
    return ModelProfile(microbatch_size=1, layers=(layer,) * case.num_layers, reference_flops_per_s=SPEED)


def _measured_profile(dilation: float) -> ModelProfile:
    """Profile the small GPT as `wantrain profile` does."""
    import torch

    from wantrain.training.layer_profiler import measure_layers

    torch.set_num_threads(1)
    return measure_layers(SMALL_GPT, 4, device=torch.device("cpu"), source="measured", dilation=dilation).profile


def job_of(case: Case, codec_speed: float) -> EmulatedJob:
    """Return the case as a job with its plan, which holds the prediction."""
    profile = profile_of(case)
    topology = topology_of(case, codec_speed, profile.reference_flops_per_s or SPEED)
    plan = make_plan(
        topology, profile, batch_size=case.microbatches * case.replicas * profile.microbatch_size,
        num_stages=case.stages, num_replicas=case.replicas, num_lanes=2 * case.replicas, forward_codec=case.forward,
        backward_codec=case.backward, gradient_codec=case.gradients, schedule=case.schedule,
    )  # fmt: skip
    return EmulatedJob(
        plan, topology, profile, (SMALL_GPT.seq_len, SMALL_GPT.hidden) if case.is_real else case.shape,
        dilation=case.dilation, model=SMALL_GPT if case.is_real else None,
    )  # fmt: skip


def codec_speed() -> float:
    """Return values per second that this machine's codecs get through, as `wantrain profile` measures them."""
    import torch

    from wantrain.training.codec_profiler import measure_codecs

    torch.set_num_threads(1)
    return measure_codecs(torch.device("cpu")).values_per_s


def computing(timeline: Timeline) -> list[list[Any]]:
    """Return rank, kind, microbatch, start and end of all computing, in seconds from the first."""
    events = [event for event in timeline.events if event.kind in COMPUTE_KINDS]
    first_s = min(event.start_s for event in events)
    return [
        [event.rank, event.kind, event.microbatch, round(event.start_s - first_s, 5), round(event.end_s - first_s, 5)]
        for event in events
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--go-on", action="store_true", help="leave out cases that the results hold")
    parser.add_argument("--list", action="store_true", help="print the predictions and run nothing")
    parser.add_argument("--stored", action="store_true", help="run nothing: predict the stored runs anew")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="keep no result")
    args = parser.parse_args()
    known = {run.case for run in stored_runs()} if args.go_on else set()
    cases = [case for case in CASES if args.only in case.name and case not in known]
    if not cases:
        parser.error(f"no case has {args.only!r} in its name")
    if args.stored:
        compare_with_stored()
        return
    if args.steps < 3:
        parser.error(f"the first two steps don't count; give at least 3 (got {args.steps})")
    run(args, cases)


def run(args: argparse.Namespace, cases: list[Case]) -> None:
    """Predict, run and compare."""
    speed = codec_speed()
    errors, num_exposed = [], 0
    for case in cases:
        job = job_of(case, speed)
        prediction = job.plan.prediction
        assert prediction is not None
        exposed = prediction.exposed_communication_s / prediction.step_s
        said = f"{case.name:<34} predicted {format_time(prediction.step_s):>8}, not hidden {exposed:4.0%}"
        if args.list:
            print(said, flush=True)
            continue
        measured = measure(case, job, args, {"codec_values_per_s": speed, "exposed_share": exposed})
        measured_s = statistics.median(measured.settled_s)
        errors.append(prediction.step_s / measured_s - 1)
        num_exposed += exposed >= 0.3
        noise = f"  ({measured.stolen:.0%} stolen)" if measured.stolen > _MOST_STOLEN else ""
        print(f"{said}   measured {format_time(measured_s):>8}   {_marked(errors[-1])}{noise}", flush=True)
    if errors:
        print(_summed_up(errors, num_exposed))


def _marked(error: float) -> str:
    return f"{error:+.1%}" + ("" if abs(error) <= _SHOWN_WITHIN else "  <")


def _summed_up(errors: Sequence[float], num_exposed: int) -> str:
    sizes = [abs(error) for error in errors]
    median, worst = statistics.median(sizes), max(sizes)
    return (
        f"{len(errors)} runs, {num_exposed} with 30 % or more not hidden:"
        f" off by {median:.1%} in the median, {worst:.1%} at worst"
    )


@dataclass(frozen=True)
class StoredRun:
    """A run as the results hold it: the case, what was predicted from, the steps, and who computed what when."""

    case: Case
    plan: Plan
    topology: Topology
    profile: ModelProfile
    predicted_s: float
    measured_s: float
    computing: list[list[Any]]
    exposed_share: float
    """Of the predicted step: communication that nothing hides."""
    stolen: float
    """Share of the processors' time that other machines had during the run."""


def stored_runs(records: Sequence[dict[str, Any]] | None = None) -> list[StoredRun]:
    """Return the newest run of every case, of the stored records or of those given."""
    newest: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for record in read_results("prediction") if records is None else records:
        if "asked" in record:
            newest[record["case"]] = (record, [])
        else:
            newest[record["case"]][1].append(record)
    return [_stored_run(asked, min(runs, key=lambda run: run["stolen"])) for asked, runs in newest.values() if runs]


def _stored_run(asked: dict[str, Any], run: dict[str, Any]) -> StoredRun:
    known = asked["asked"]
    case = Case(**known | {"shape": tuple(known["shape"]), "speeds": tuple(known["speeds"])})
    profile = ModelProfile.model_validate(asked["profile"]) if case.is_real else profile_of(case)
    topology = topology_of(case, asked["codec_values_per_s"], profile.reference_flops_per_s or SPEED)
    measured_s = statistics.median(run["measured_s"][2:])
    plan = Plan.model_validate(asked["plan"])
    return StoredRun(
        case, plan, topology, profile, asked["predicted_s"], measured_s, run["computing"], asked["exposed_share"],
        run["stolen"],
    )  # fmt: skip


def compare_with_stored() -> None:
    """Print what is predicted now beside what was predicted and measured then."""
    errors, num_exposed = [], 0
    for run in stored_runs():
        prediction = predict(run.plan, run.topology, run.profile)
        errors.append(prediction.step_s / run.measured_s - 1)
        num_exposed += prediction.exposed_communication_s >= 0.3 * prediction.step_s
        then, now, seen = map(format_time, (run.predicted_s, prediction.step_s, run.measured_s))
        print(f"{run.case.name:<34} then {then:>8}   now {now:>8}   measured {seen:>8}   {_marked(errors[-1])}")
    if errors:
        print(_summed_up(errors, num_exposed))


def measure(case: Case, job: EmulatedJob, args: argparse.Namespace, known: dict[str, Any]) -> Measured:
    """Run a job, again if the machine was not ours; write down the prediction before and the steps after."""
    assert job.plan.prediction is not None
    record = {"benchmark": "prediction", "case": case.name}
    keep = (lambda _: None) if args.smoke else (lambda more: append_result("prediction", record | more))
    emulated = "network" if case.is_real else "compute and network"
    profile = job.profile.model_dump(mode="json") if case.is_real else None
    plan = job.plan.model_dump(mode="json")
    stored = {"predicted_s": job.plan.prediction.step_s, "profile": profile, "plan": plan}
    keep({"asked": asdict(case), "emulated": emulated} | stored | known)
    runs: list[Measured] = []
    while not runs or (runs[-1].stolen > _MOST_STOLEN and len(runs) < _MOST_RUNS):
        runs.append(run_job(replace(job, steps=args.steps)))
        keep({"measured_s": runs[-1].steps_s, "stolen": runs[-1].stolen, "computing": computing(runs[-1].timeline)})
    return min(runs, key=lambda one: one.stolen)


if __name__ == "__main__":
    main()
