"""How soon does a slow network reach a loss? A GPT's real training, on the clock of measured steps.

A GPT of 10.8 million weights is trained from scratch on real text with each codec: the very trainer, pipeline and
codecs of a job over in-memory channels, so that the loss after each step is what a network would give. How long steps
take is measured apart, by `bench_network.py`: the same model's shapes on an emulated network, its layers slept for a
V100's seconds. What is told is the seconds until the held-out loss is what uncompressed training has after 80 % of its
steps.

    python benchmarks/bench_time_to_loss.py             train and measure what the results lack, then the table
    python benchmarks/bench_time_to_loss.py --table     only what is there

Uncompressed losses are everyone's: torch's pipelines send what `raw` sends. A codec that remembers has steps of its
first epoch measured apart, as its first visits are sent.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import bench_network
from bench_convergence import Choice, Experiment, held_out_loss, identity, plan_for, train
from harness import RESULTS, append_result, exit_with, read_results, text_of
from network_rows import NAME as NETWORK
from network_rows import Row, rows_of
from network_setting import System
from wantrain.config import DataConfig, TrainingConfig
from wantrain.data import TokenFile
from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.resources import find_config
from wantrain.units import format_bandwidth, parse_bytes_per_s

NAME = "time_to_loss"

BATCH_SIZE = 16

UPLINKS = "100 Mbit/s,500 Mbit/s"

TARGET_AT = 0.8
"""The loss to reach: uncompressed training's after this share of its steps."""

POINTS = 15
"""How often on the way the held-out loss is told."""


class Run(NamedTuple):
    """One way to train: its codecs, and who sends as many bytes in later steps and in those of the first epoch."""

    choice: Choice
    system: str
    first: str = ""
    """Of the first epoch; empty: as later."""


UNCOMPRESSED = "uncompressed"

RUNS = {
    UNCOMPRESSED: Run(Choice(), "raw"),
    "hadamard 4/4": Run(Choice("hadamard:4", "hadamard:4"), "hadamard:4/hadamard:4"),
    "aqsgd 3/6": Run(
        Choice("aqsgd:3,first=hadamard:4", "hadamard:6"),
        "aqsgd:3,first=hadamard:4/hadamard:6",
        "hadamard:4/hadamard:6",
    ),
}
"""By the bits of activations and of their gradients."""

TORCH = ("torch 1F1B", "torch GPipe")


class Curve(NamedTuple):
    """Held-out losses of one run."""

    name: str
    first_steps: int
    """Steps in which samples are seen for the first time."""
    points: tuple[tuple[int, float], ...]
    """Steps so far, and the loss then."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Curve:
        """Read a record."""
        return cls(record["run"], record["first_steps"], tuple((steps, loss) for steps, loss in record["losses"]))

    def loss_at(self, steps: float) -> float:
        """Return the loss after some steps, on a straight line between its neighbours."""
        before = max((point for point in self.points if point[0] <= steps), default=self.points[0])
        after = min((point for point in self.points if point[0] >= steps), default=self.points[-1])
        return before[1] + (after[1] - before[1]) * (steps - before[0]) / max(1, after[0] - before[0])

    def steps_to(self, loss: float) -> float:
        """Return after how many steps the loss is first no more than this; infinity where it never is."""
        for (steps, here), (later, there) in zip(self.points, self.points[1:], strict=False):
            if there <= loss:
                return later if here <= loss else steps + (later - steps) * (here - loss) / (here - there)
        return math.inf

    def seconds(self, steps: float, first_s: float, later_s: float) -> float:
        """Return how long some steps take."""
        first = min(steps, self.first_steps)
        return first * first_s + (steps - first) * later_s


class Timed(NamedTuple):
    """A curve on one network's clock, by the system that took so long."""

    curve: Curve
    system: str
    uplink_bytes_per_s: float
    first_s: float
    later_s: float

    @property
    def points(self) -> list[tuple[float, float]]:
        """Seconds so far, and the loss then."""
        return [(self.curve.seconds(steps, self.first_s, self.later_s), loss) for steps, loss in self.curve.points]

    def seconds_to(self, loss: float) -> float:
        """Return the seconds until a loss is reached."""
        return self.curve.seconds(self.curve.steps_to(loss), self.first_s, self.later_s)


def newest(records: Sequence[dict[str, Any]]) -> tuple[list[Curve], list[Timed]]:
    """Return the curves of the newest experiment, and each on the clock of every network where its steps were measured.

    `records` holds curves and steps.
    """
    own = _curves(records)
    last = own[-1]
    curves = [Curve.of(record) for record in own if record["experiment"] == last["experiment"]]
    rows = rows_of(record for record in records if record["benchmark"] == NETWORK)
    shape = (last["model"], last["stages"], BATCH_SIZE)
    own_rows = [row for row in rows if (row.setting.model, row.setting.stages, row.setting.microbatches) == shape]
    return curves, list(_timed(curves, own_rows))


def _curves(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["benchmark"] == NAME]


def _timed(curves: Sequence[Curve], rows: Sequence[Row]) -> Iterator[Timed]:
    steps = {(row.setting.uplink_bytes_per_s, row.system): row.step_s for row in rows if not row.setting.latency_s}
    for uplink in sorted({uplink for uplink, _ in steps}):
        for curve in curves:
            run = RUNS[curve.name]
            for name in (*(TORCH if curve.name == UNCOMPRESSED else ()), run.system):
                later, first = (steps.get((uplink, System.parse(one))) for one in (name, run.first or name))
                if later is not None and first is not None:
                    yield Timed(curve, name if name in TORCH else f"wantrain {curve.name}", uplink, first, later)


def target_loss(curves: Sequence[Curve]) -> float:
    """Return the loss to reach."""
    base = next(curve for curve in curves if curve.name == UNCOMPRESSED)
    return base.loss_at(TARGET_AT * base.points[-1][0])


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table: seconds to the loss for each system and network, against the fastest torch there."""
    curves, all_timed = newest(records)
    target = target_loss(curves)
    best = {
        uplink: min(one.seconds_to(target) for one in all_timed
                    if one.uplink_bytes_per_s == uplink and one.system in TORCH)
        for uplink in {one.uplink_bytes_per_s for one in all_timed if one.system in TORCH}
    }  # fmt: skip
    yield f"Seconds until the held-out loss is {target:.3f}, uncompressed after {TARGET_AT:.0%} of its steps:\n"
    yield "| uplink | system | step s, first epoch | later | steps | seconds | best torch over it | final loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in all_timed:
        seconds = one.seconds_to(target)
        times = best.get(one.uplink_bytes_per_s)
        cells = [
            format_bandwidth(one.uplink_bytes_per_s), one.system, f"{one.first_s:.3f}", f"{one.later_s:.3f}",
            f"{one.curve.steps_to(target):.0f}", f"{seconds:.1f}", f"{times / seconds:.2f}×" if times else "",
            f"{one.curve.points[-1][1]:.4f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def make_experiment(args: argparse.Namespace) -> Experiment:
    """Return the model, its training and its samples."""
    model = ModelConfig.load(find_config("models", args.model, ConfigError))
    tokens = TokenFile.open(DataConfig(source=args.data), Path(tempfile.gettempdir()) / "wantrain-bench")
    samples = tokens.training(model).spread(args.samples)
    training = TrainingConfig(
        steps=args.steps, batch_size=BATCH_SIZE, microbatch_size=4, learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
    )  # fmt: skip
    held_out = tokens.validation(model).spread(args.validation_samples)
    return Experiment(model, training, samples, held_out, args.steps * BATCH_SIZE / len(samples), samples, 0)


def train_missing(experiment: Experiment, same: dict[str, Any], args: argparse.Namespace) -> None:
    """Train with every codec of which there is no curve yet, and keep its losses."""
    there = {record["run"] for record in _curves(read_results(NAME, args.out)) if record["experiment"] == same}
    model, steps = experiment.model, experiment.training.steps
    begin = gpt.build_layers(model, 0, model.num_layers_total, args.seed)
    after = [round(i * steps / POINTS) for i in range(1, POINTS + 1)]
    for name, run in RUNS.items():
        if name in there:
            continue
        began = time.monotonic()
        kept = train(experiment, plan_for(experiment, run.choice, args.stages), args.seed, begin, after)
        losses = [(count, held_out_loss(kept[count], experiment.held_out)) for count in after]
        seconds = round(time.monotonic() - began, 1)
        first_steps = min(steps, math.ceil(len(experiment.samples) / BATCH_SIZE)) if run.first else 0
        record = {"benchmark": NAME, "run": name, "model": args.model, "stages": args.stages, "seconds": seconds}
        append_result(NAME, record | {"first_steps": first_steps, "losses": losses, "experiment": same}, args.out)
        print(f"{name}: {losses[-1][1]:.4f} after {steps} steps ({seconds} s)", flush=True)


def measure_steps(args: argparse.Namespace, console: Console) -> None:
    """Measure the steps of every system that the table names, where the results lack them."""
    names = [*TORCH, *dict.fromkeys(name for run in RUNS.values() for name in (run.system, run.first) if name)]
    network = bench_network.parse_arguments(
        ["--model", args.model, "--stages", str(args.stages), "--microbatches", str(BATCH_SIZE),
         "--uplinks", args.uplinks, "--latencies", "", "--dilation", str(args.dilation), "--out", str(args.out)]
    )  # fmt: skip
    bench_network.sweep(network, [System.parse(name) for name in names], console, kept_in=NAME)


def experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `make_experiment` asks for."""
    parser.add_argument("--data", default="stdlib", help="a text file or folder (default: Python's own library)")
    parser.add_argument("--model", default="gpt_10m", help="what is trained (default: %(default)s)")
    parser.add_argument("--steps", type=_steps, default=200)
    parser.add_argument("--samples", type=_samples, default=800, help="of training text; some epochs go over them")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--validation-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least} (got {text!r})")
    return int(text)


_steps = partial(_at_least, POINTS)
_samples = partial(_at_least, BATCH_SIZE)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiment_arguments(parser)
    parser.add_argument("--stages", type=int, default=6, help="of its pipeline (default: %(default)s)")
    parser.add_argument(
        "--uplinks", type=text_of(parse_bytes_per_s), default=UPLINKS, help="comma separated (default: %(default)s)"
    )
    parser.add_argument("--dilation", type=float, default=16.0, help="slow the network's steps down")
    parser.add_argument("--only", choices=("train", "steps"), help="the losses alone, or the steps alone")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are kept")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if min(args.validation_samples, args.stages) < 1:
        parser.error("at least one sample to validate, and one stage to hold layers")
    torch.set_num_threads(1)
    if not args.table and args.only != "steps":
        experiment = make_experiment(args)
        train_missing(experiment, identity(experiment, args.data, seed=args.seed), args)
    if not args.table and args.only != "train":
        measure_steps(args, Console())
    records = read_results(NAME, args.out)
    print("\n".join(table(records)) if _curves(records) else "no curve is there yet")


if __name__ == "__main__":
    exit_with(main)
