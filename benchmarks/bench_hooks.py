"""How soon does a stock DDP program reach a loss on a slow network, with each of its hooks?

A GPT of 10.8 million weights is trained from scratch on real text by torch's DistributedDataParallel, four processes of
it over loopback, once with each hook; the held-out loss is told on the way. How long a step takes is measured apart, on
the emulated network, with the same shapes and as many samples, as `bench_data_parallel.py` does.

    python benchmarks/bench_hooks.py             train what the results lack, measure steps where they lack, the table
    python benchmarks/bench_hooks.py --table     only what is there

What is told is the seconds until the held-out loss is what training without a hook has after 80 % of its steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

import bench_data_parallel
from bench_convergence import Experiment, held_out_loss, identity
from bench_planning import measure
from bench_time_to_loss import BATCH_SIZE, POINTS, TARGET_AT, Curve, experiment_arguments, make_experiment
from harness import RESULTS, append_result, exit_with, read_results, text_of
from peers.ddp import HOOKS, with_hook
from wantrain.data import Lanes
from wantrain.models import gpt
from wantrain.training.loop import learning_rate
from wantrain.units import parse_bytes_per_s

NAME = "hooks"

REPLICAS = 4

PLAIN = next(iter(HOOKS))
"""Without a hook: whose loss is to be reached."""


def train_rank(rank: int, name: str, args: argparse.Namespace, folder: str) -> None:
    """Be one replica; rank 0 writes held-out losses, by the number of steps before them, into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=REPLICAS)
    experiment = make_experiment(args)
    layers = gpt.build_layers(experiment.model, 0, experiment.model.num_layers_total, args.seed)
    ddp = with_hook(name, nn.Sequential(*layers))
    losses = _train(ddp, layers, experiment, rank, args.seed)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # with torch's PowerSGD hook every second program aborts as it ends


def _train(
    ddp: nn.Module, layers: list[nn.Module], experiment: Experiment, rank: int, seed: int
) -> list[tuple[int, float]]:
    training = experiment.training
    optimizer = torch.optim.AdamW(ddp.parameters(), betas=training.betas, weight_decay=training.weight_decay)
    lanes = Lanes(len(experiment.samples), REPLICAS, seed)
    after = {round(i * training.steps / POINTS) for i in range(1, POINTS + 1)}
    losses = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        inputs, targets = experiment.samples.batch(lanes.draw(step, training.batch_size)[rank])
        optimizer.zero_grad()
        loss: Any = gpt.loss(ddp.train()(torch.from_numpy(inputs)), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), training.clip_norm or math.inf)
        optimizer.step()
        if step + 1 in after and rank == 0:
            losses.append((step + 1, held_out_loss(layers, experiment.held_out)))
    return losses


def train_missing(args: argparse.Namespace) -> None:
    """Train with every hook of which there is no curve yet, and keep its losses."""
    experiment = make_experiment(args)
    same = identity(experiment, args.data, seed=args.seed)
    there = {one["run"] for one in _curves(read_results(NAME, args.out)) if one["experiment"] == same}
    for name in args.hook:
        if name in there:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            spawn(train_rank, (name, args, folder), nprocs=REPLICAS)  # type: ignore[no-untyped-call]
            losses = json.loads(Path(folder, "losses.json").read_text(encoding="utf-8"))
        record = {"benchmark": NAME, "run": name, "model": args.model, "replicas": REPLICAS, "first_steps": 0}
        record |= {"losses": losses, "seconds": round(time.monotonic() - began, 1), "experiment": same}
        append_result(NAME, record, args.out)
        print(f"{name}: {losses[-1][1]:.4f} after {losses[-1][0]} steps ({record['seconds']} s)", flush=True)


def measure_steps(args: argparse.Namespace) -> None:
    """Measure a step with every hook on the emulated network, unless the results hold it."""
    part = bench_data_parallel.PARTS["replicas"]
    asked = {"model": args.model, "samples": BATCH_SIZE // REPLICAS, "systems": tuple(HOOKS), "replicas": REPLICAS}
    work = argparse.Namespace(**part._asdict() | asked, latency_ms=1.0, steps=args.timed_steps)
    work.uplink = args.uplink
    if step_seconds(read_results(NAME, args.out), args.model, args.uplink):
        return
    entries = bench_data_parallel.entries_of("replicas", work)
    measure(entries, 1)
    append_result(NAME, bench_data_parallel.record_of("replicas", work, entries), args.out)


def step_seconds(records: Sequence[dict[str, Any]], model: str, uplink: str) -> dict[str, float]:
    """Return each hook's newest seconds a step of this model on a network."""
    found = [one for one in _steps(records) if (one["model"], one["uplink"]) == (model, uplink)]
    return {one["name"]: one["step_s"]["median"] for one in found[-1]["entries"]} if found else {}


def _curves(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in records if one["benchmark"] == NAME]


def _steps(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in records if one["benchmark"] != NAME]


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table of the newest experiment: steps and seconds to the loss, by network and hook."""
    last = _curves(records)[-1]
    curves = {one["run"]: Curve.of(one) for one in _curves(records) if one["experiment"] == last["experiment"]}
    steps = curves[PLAIN].points[-1][0]
    target = curves[PLAIN].loss_at(TARGET_AT * steps)
    yield f"Until the held-out loss is {target:.3f}, without a hook after {TARGET_AT:.0%} of {steps} steps:\n"
    yield "| uplink | hook | step s | steps | seconds | without a hook over it | final loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for uplink in dict.fromkeys(one["uplink"] for one in _steps(records)):
        seconds = step_seconds(records, last["model"], uplink)
        timed = {name: curve.steps_to(target) * seconds[name] for name, curve in curves.items() if name in seconds}
        for name, total in timed.items():
            taken = ["never", "", ""]
            if math.isfinite(total):
                taken = [f"{curves[name].steps_to(target):.0f}", f"{total:.1f}", f"{timed[PLAIN] / total:.2f}×"]
            cells = [uplink, name, f"{seconds[name]:.3f}", *taken, f"{curves[name].points[-1][1]:.4f}"]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiment_arguments(parser)
    parser.add_argument(
        "--uplink", type=text_of(parse_bytes_per_s), default="100 Mbit/s", help="of every worker (default: %(default)s)"
    )
    parser.add_argument(
        "--hook", action="append", choices=HOOKS, metavar="NAME", help="train with this one alone; may be repeated"
    )
    parser.add_argument("--timed-steps", type=int, default=5, help="of which the first two don't count")
    parser.add_argument("--only", choices=("train", "steps"), help="the losses alone, or the steps alone")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args()
    if args.timed_steps < 3:
        parser.error("the first two steps don't count; give at least three")
    args.hook = args.hook or list(HOOKS)
    if not args.table and args.only != "steps":
        train_missing(args)
    if not args.table and args.only != "train":
        measure_steps(args)
    records = read_results(NAME, args.out)
    print("\n".join(table(records)) if _curves(records) else "no curve is there yet")


if __name__ == "__main__":
    exit_with(main)
