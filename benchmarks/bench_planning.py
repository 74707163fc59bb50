r"""Is what `wantrain plan` says true? Plans, advice and break-even against runs on the emulated WAN.

    python benchmarks/bench_planning.py --placement     planned, naive and site-by-site placement, worldwide
    python benchmarks/bench_planning.py --placement --machines 2 --model gpt2 --microbatch-size 4 --batch-size 128 \
        --stages 4 --replicas 4 --dilation 24           the same with 16 workers and a GPT's true shapes, in 18 GB
    python benchmarks/bench_planning.py --advice        what would help most, before and after
    python benchmarks/bench_planning.py --break-even    the link speed under which a codec pays, against the crossover

Layers sleep; everything else is real (`emulated_job`). Every run is predicted before it begins. Runs that are compared
are interleaved, and each figure is the median of their steps without the first two. `--save` keeps the results.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import emulated_job
from bench_prediction import codec_speed
from emulated_job import EmulatedJob
from harness import append_result, exit_with, spread
from network_setting import flops_per_s
from wantrain.errors import ConfigError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile, gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.advice import what_would_help
from wantrain.scheduler.break_even import break_even_bytes_per_s
from wantrain.scheduler.cost_model import predict
from wantrain.scheduler.solve import find_plan, make_plan
from wantrain.topology import Topology
from wantrain.units import format_bandwidth, format_time

SPEED = 1e12
"""Operations per second of a worker of speed 1; layers are profiled in seconds on such a one."""

SPEEDS = (1.0, 0.5, 2.0, 1.0, 0.5, 2.0, 1.0, 0.7)
"""Of the workers around the world, in the file's order and from the beginning again: chosen, a factor of four apart."""

_IN_SITE = {"bandwidth": "10 Gbit/s", "latency": "0.1 ms"}
"""Between machines of one region, as the shipped two sites have it."""

SHAPE = (256, 512)
"""Of a sample's activation."""

MOST_BUSY = 0.7
"""Chosen: with more of the machine in use, emulated workers wait for its processors, which theirs would not."""

_BESIDE = (0.5, 0.71, 1.0, 1.41, 2.0)
"""Rates at which the crossover is looked for, as multiples of the predicted one."""


def uniform_profile(num_layers: int, layer_s: float, shape: tuple[int, int], parameters: int) -> ModelProfile:
    """Return layers that all take `layer_s` forwards and twice that backwards on a worker of speed 1."""
    values = shape[0] * shape[1]
    layer = LayerProfile(
        name="layer", forward_flops=layer_s * SPEED, backward_flops=2 * layer_s * SPEED,
        parameter_bytes=4 * parameters, activation_elements=values, stored_bytes=4 * values,
    )  # fmt: skip
    return ModelProfile(microbatch_size=1, layers=(layer,) * num_layers, reference_flops_per_s=SPEED)


@dataclass
class Entry:
    """One plan under test, with the steps that were measured of it."""

    name: str
    job: EmulatedJob
    steps_s: list[float]
    stolen: float = 0.0
    busy: float = 0.0
    """Share of this machine's processors in use during the steps, in the busiest run."""

    @property
    def predicted_s(self) -> float | None:
        """The step's seconds, as they were predicted before the run; None for another's program."""
        return None if self.job.peer else predict(self.job.plan, self.job.topology, self.job.profile).step_s

    @property
    def measured_s(self) -> float:
        """The median of all its runs' settled steps."""
        return statistics.median(self.steps_s)

    @property
    def said(self) -> str:
        """What is printed of it: the prediction, the steps, and by how much the prediction is off."""
        low, middle, high = map(format_time, (min(self.steps_s), self.measured_s, max(self.steps_s)))
        noise = f"   {self.stolen:.0%} stolen" if self.stolen > 0.03 else ""
        noise += f"   {self.busy:.0%} busy: dilate more" if self.busy > MOST_BUSY else ""
        predicted, error = "", ""
        if self.predicted_s is not None:
            predicted = f"predicted {format_time(self.predicted_s):>8}"
            error = f"   {self.predicted_s / self.measured_s - 1:+.1%}"
        return f"{self.name:<32} {predicted:<18}   measured {middle:>8} ({low} – {high}){error}{noise}"

    def as_json(self) -> dict[str, Any]:
        """Return what is kept of it."""
        plan = self.job.plan
        known = {"name": self.name, "predicted_s": self.predicted_s, "workers": plan.workers, "stages": plan.num_stages}
        machine = {"stolen": self.stolen, "busy": round(self.busy, 3), "dilation": self.job.dilation}
        return known | {"step_s": spread(self.steps_s)} | machine


def measure(entries: Sequence[Entry], rounds: int) -> None:
    """Run the entries in turn, as often as asked; print each beside its prediction."""
    for _ in range(rounds):
        for entry in entries:
            measured = emulated_job.run(entry.job)
            entry.steps_s += measured.settled_s
            entry.stolen, entry.busy = max(entry.stolen, measured.stolen), max(entry.busy, measured.busy)
    for entry in entries:
        print(entry.said, flush=True)


def worldwide(codec_values_per_s: float, machines: int = 1, speed: float = SPEED) -> Topology:
    """Return the shipped worldwide topology with so many machines in each region, of uneven speed."""
    text = tomllib.loads(find_config("topologies", "worldwide", TopologyError).read_text(encoding="utf-8"))
    if machines > 1:
        text["link"] += [{"within": worker["site"]} | _IN_SITE for worker in text["worker"]]
        text["worker"] = [worker | {"count": machines} for worker in text["worker"]]
    topology = Topology.parse({"name": "worldwide"} | text, TopologyError, "worldwide")
    workers = tuple(
        worker.model_copy(update={"flops_per_s": times * speed, "codec_values_per_s": codec_values_per_s})
        for worker, times in zip(topology.workers, itertools.cycle(SPEEDS), strict=False)
    )
    return topology.model_copy(update={"workers": workers})


def placement(args: argparse.Namespace) -> dict[str, Any]:
    """Planned against naive and against site by site, the same codecs for all."""
    speed, profile, shape = SPEED, uniform_profile(16, 0.02, SHAPE, 4_000_000), SHAPE
    if args.model:
        config = ModelConfig.load(find_config("models", args.model, ConfigError))
        speed, profile = flops_per_s(), gpt_profile(config, args.microbatch_size)
        shape = (config.seq_len, config.hidden)
    topology = worldwide(codec_speed() * args.dilation, args.machines, speed)
    codecs = {"forward_codec": args.codec, "backward_codec": args.codec, "gradient_codec": args.gradient_codec}
    found = find_plan(
        topology, profile, batch_size=args.batch_size, num_stages=args.stages, num_replicas=args.replicas, **codecs
    )
    entries = [
        Entry(name, EmulatedJob(plan, topology, profile, shape, args.steps, args.dilation), [])
        for name, plan in (("planned", found.plan), ("naive", found.naive), ("sites together", found.together))
        if plan is not None
    ]
    for entry in entries:
        plan = entry.job.plan
        print(f"{entry.name:<16} {plan.num_stages} stages × {len(plan.replicas)}: {', '.join(plan.workers)}")
    if args.list:
        print({entry.name: entry.predicted_s for entry in entries})
        return {}
    measure(entries, args.rounds)
    planned = entries[0].measured_s
    for entry in entries[1:]:
        print(f"{entry.name} takes {entry.measured_s / planned:.2f} times as long as planned, measured")
    work = {
        "model": args.model,
        "microbatch_size": args.microbatch_size,
        "machines": args.machines,
        "batch_size": args.batch_size,
    }
    return work | {"codecs": codecs, "speeds": SPEEDS, "entries": [entry.as_json() for entry in entries]}


def advice(args: argparse.Namespace) -> dict[str, Any]:
    """Change what would help most, and see whether it does."""
    text: dict[str, Any] = {
        "name": "uneven",
        "worker": [{"name": name, "site": name, "flops": f"{SPEED} FLOP/s"} for name in ("a", "b", "c", "d")],
        "link": [
            {"between": [x, y], "bandwidth": rate, "latency": "10 ms"}
            for x, y, rate in (
                ("a", "b", "100 Mbit/s"), ("b", "c", "40 Mbit/s"), ("c", "d", "80 Mbit/s"),
                ("a", "c", "20 Mbit/s"), ("a", "d", "20 Mbit/s"), ("b", "d", "20 Mbit/s"),
            )
        ],
    }  # fmt: skip
    topology = Topology.parse(text, TopologyError, "uneven")
    profile = uniform_profile(8, 0.02, SHAPE, 200_000)
    plan = make_plan(topology, profile, batch_size=12, num_stages=4, num_replicas=1)
    best = next(one for one in what_would_help(plan, topology, profile) if one.what.startswith("link"))
    source, target = best.what.removeprefix("link ").split(" → ")
    rate = topology.with_link(source, target).rules[-1].bandwidth_bytes_per_s
    changed = topology.with_link(source, target, bandwidth_bytes_per_s=2 * rate)
    print(f"{best}: predicted {format_time(best.step_s)}")
    entries = [
        Entry(name, EmulatedJob(plan, where, profile, SHAPE, args.steps, args.dilation), [])
        for name, where in (("before", topology), ("after", changed))
    ]
    measure(entries, args.rounds)
    gain = 1 - entries[1].measured_s / entries[0].measured_s
    print(f"said −{best.gain:.1%}, measured −{gain:.1%}")
    return {"advice": str(best), "gain": best.gain, "measured": gain, "entries": [one.as_json() for one in entries]}


def break_even(args: argparse.Namespace) -> dict[str, Any]:
    """Look for the rate at which a codec stops paying, around where it should be.

    With kernels of the reference backend: fast ones pay up to rates that two cores can't emulate.
    """
    emulated_job.use_reference_kernels()  # from here on, in this process too
    speed = codec_speed()
    shape = (256, 1024)
    profile = uniform_profile(4, 0.0005, shape, 10_000)

    def network(rate: float) -> Topology:
        workers = [{"name": name, "flops": f"{SPEED} FLOP/s", "codec_speed": speed * args.dilation} for name in "ab"]
        link = {"between": ["a", "b"], "bandwidth": f"{8 * rate} bit/s", "latency": "1 ms"}
        return Topology.parse({"name": "pair", "worker": workers, "link": [link]}, TopologyError, "pair")

    def plan(codec: str) -> Plan:
        return make_plan(
            network(1e8), profile, batch_size=16, num_stages=2, num_replicas=1, forward_codec=codec,
            backward_codec=codec, max_in_flight=(4, 1),
        )  # fmt: skip

    plans = {codec: plan(codec) for codec in ("raw:fp32", args.codec)}
    predicted = break_even_bytes_per_s(plans[args.codec], network(1e8), profile)
    print(f"{args.codec} at {speed / 1e6:.0f} million values/s pays below {format_bandwidth(predicted)}, as predicted")
    points = []
    for times in _BESIDE:
        topology = network(predicted * times)
        entries = [
            Entry(
                f"{codec}, {format_bandwidth(predicted * times)}",
                EmulatedJob(one, topology, profile, shape, args.steps, args.dilation, is_reference=True),
                [],
            )
            for codec, one in plans.items()
        ]
        measure(entries, args.rounds)
        points.append((predicted * times, entries[1].measured_s / entries[0].measured_s))
    found = crossover([math.log(rate) for rate, _ in points], [math.log(ratio) for _, ratio in points])
    measured = None if found is None else math.exp(found)
    said = "none" if measured is None else f"{format_bandwidth(measured)}, off by {predicted / measured - 1:+.1%}"
    print(f"measured crossover: {said}")
    return {"codec": args.codec, "predicted": predicted, "measured": measured, "ratios": points, "codec_speed": speed}


def crossover(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return where ys, joined by straight lines, last pass from below 0 to above; None if they don't."""
    for (x0, y0), (x1, y1) in reversed(list(zip(zip(xs, ys), zip(xs[1:], ys[1:])))):  # noqa: B905 - pairs
        if y0 <= 0 < y1:
            return x0 + (x1 - x0) * -y0 / (y1 - y0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"placement": placement, "advice": advice, "break_even": break_even}
    for name, part in parts.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", action="store_true", help=(part.__doc__ or "").split("\n")[0]
        )
    parser.add_argument("--codec", default="quantized:8", help="at boundaries")
    parser.add_argument("--gradient-codec", default="error_feedback:quantized:8")
    parser.add_argument("--model", help="with --placement: whose shapes (default: 16 small uniform layers)")
    parser.add_argument("--microbatch-size", type=int, default=1, help="with --model: samples of a microbatch")
    parser.add_argument("--machines", type=int, default=1, help="with --placement: in each of the eight regions")
    parser.add_argument("--batch-size", type=int, default=16, help="with --placement: samples a step")
    parser.add_argument("--stages", type=int)
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--dilation", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="with --placement: the predictions alone")
    parser.add_argument("--save", action="store_true", help="keep the results")
    args = parser.parse_args()
    if args.machines < 1 or args.dilation < 1 or args.steps < 3 or args.rounds < 1:
        parser.error("at least one machine a region, one run, three steps (two don't count), and no dilation below 1")
    for name, part in parts.items():
        if getattr(args, name):
            figures = part(args)
            if args.save:
                emulated = "compute and network"
                append_result(
                    "planning", {"benchmark": name, "emulated": emulated, "dilation": args.dilation} | figures
                )


if __name__ == "__main__":
    exit_with(main)
