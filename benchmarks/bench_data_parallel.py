"""What averaging gradients costs replicas on a slow network, and what compressing them buys back.

    python benchmarks/bench_data_parallel.py --save              both tables below
    python benchmarks/bench_data_parallel.py --only pipelines    2 stages × 4 replicas: what each codec brings
    python benchmarks/bench_data_parallel.py --only replicas     4 whole models: beside torch's DDP and its hooks

Shapes of GPT-2 (124 million weights) at 500 Mbit/s, for whole models of a GPT of 10.8 million at 100 Mbit/s; 16 samples
a replica and step, every worker behind an uplink of its own. Layers and optimizer sleep for a V100's seconds;
gradients, codecs and transport are real (`emulated_job`), and take so much of a small machine that it must be slowed a
lot: where a raw step is far from its prediction, it was not slowed enough. Systems take turns, a run of some steps
each; a step is the median of its runs' steps without the first two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench_planning import Entry, measure
from bench_prediction import codec_speed
from emulated_job import EmulatedJob
from harness import append_result, exit_with, text_of
from network_setting import flops_per_s, uplinks_topology
from peers.ddp import HOOKS
from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.solve import make_plan
from wantrain.units import parse_bytes_per_s

NAME = "data_parallel"

SAMPLES, MICROBATCH_SIZE = 16, 4
"""Of a replica and step, unless said otherwise, and of a microbatch, which adds up all gradients once more."""

ERROR_FEEDBACK = "error_feedback:quantized:4"

CODECS = {
    "wantrain raw": ("raw:fp32", "raw:fp32", "raw:fp32"),
    "wantrain aqsgd": ("aqsgd:4", "quantized:8", "raw:fp32"),
    "wantrain gradients 4 bit": ("raw:fp32", "raw:fp32", ERROR_FEEDBACK),
    "wantrain aqsgd, gradients 4 bit": ("aqsgd:4", "quantized:8", ERROR_FEEDBACK),
}
"""Of activations, of their gradients, of the weights' gradients."""


class Part(NamedTuple):
    """A table: its shape, who takes turns, and what the user may change."""

    stages: int
    replicas: int
    systems: tuple[str, ...]
    model: str
    uplink: str
    dilation: float


PARTS = {
    "pipelines": Part(2, 4, tuple(CODECS), "gpt2", "500 Mbit/s", 8.0),
    "replicas": Part(1, 4, (*HOOKS, "wantrain raw", "wantrain gradients 4 bit"), "gpt_10m", "100 Mbit/s", 4.0),
}


def entries_of(part: str, args: argparse.Namespace) -> list[Entry]:
    """Return a table's systems as jobs that can be measured, each with its plan."""
    stages, replicas, systems = PARTS[part][:3]
    config = ModelConfig.load(find_config("models", args.model, ConfigError))
    profile = gpt_profile(config, MICROBATCH_SIZE)
    topology = uplinks_topology(
        stages * replicas, parse_bytes_per_s(args.uplink), args.latency_ms / 1e3, flops_per_s=flops_per_s(),
        codec_values_per_s=codec_speed() * args.dilation,
    )  # fmt: skip
    shape = (config.seq_len, config.hidden)
    entries = []
    for name in systems:
        forward, backward, gradients = CODECS.get(name, CODECS["wantrain raw"])
        plan = make_plan(
            topology, profile, batch_size=args.samples * replicas, num_stages=stages, num_replicas=replicas,
            forward_codec=forward, backward_codec=backward, gradient_codec=gradients,
        )  # fmt: skip
        peer = name if name in HOOKS else None
        job = EmulatedJob(plan, topology, profile, shape, args.steps, args.dilation, peer=peer)
        entries.append(Entry(name, job, []))
    return entries


def record_of(part: str, work: argparse.Namespace, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return what is kept of a table."""
    asked = {key: getattr(work, key) for key in ("model", "uplink", "latency_ms", "samples", "dilation")}
    shape = {"stages": work.stages, "replicas": work.replicas, "emulated": "compute and network"}
    return {"benchmark": part} | asked | shape | {"entries": [one.as_json() for one in entries]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one of the tables")
    parser.add_argument("--model", help="whose shapes, in place of the table's own")
    parser.add_argument(
        "--uplink", type=text_of(parse_bytes_per_s), help="of every worker, in place of the table's own"
    )
    parser.add_argument("--latency-ms", type=float, default=1.0, help="one way, between any two (default: %(default)s)")
    parser.add_argument("--dilation", type=float, help="slow all down, in place of the table's own")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a replica and step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="keep the results")
    args = parser.parse_args()
    if (args.dilation is not None and args.dilation < 1) or args.rounds < 1:
        parser.error("a dilation below 1 can't be emulated, and at least one run of each must count")
    if args.steps < 3:
        parser.error("the first two steps don't count; give at least three")
    if args.samples < 1 or args.samples % MICROBATCH_SIZE:
        parser.error(f"samples go in microbatches of {MICROBATCH_SIZE}; give a multiple of that")
    given = {key: value for key, value in vars(args).items() if value is not None}
    works = {
        part: argparse.Namespace(**(PARTS[part]._asdict() | given)) for part in ([args.only] if args.only else PARTS)
    }
    tables = {part: entries_of(part, work) for part, work in works.items()}
    for part, entries in tables.items():
        work = works[part]
        print(f"{part}: {work.stages} stages × {work.replicas} replicas of {work.model} at {work.uplink}", flush=True)
        measure(entries, args.rounds)
        first = entries[0].measured_s
        for entry in entries[1:]:
            print(f"{entry.name:<32} {first / entry.measured_s:.2f}× the speed of {entries[0].name}")
        if args.save:
            append_result(NAME, record_of(part, work, entries))


if __name__ == "__main__":
    exit_with(main)
