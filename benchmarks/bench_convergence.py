"""What do lossy codecs cost in loss? The same small GPT, trained with each, on the same samples in the same order.

Four stages (and two replicas where gradients are compressed) run in one process over in-memory channels, through the
very trainer, pipeline and codecs of a job: numbers do not depend on the network. Each run starts from the weights of
its seed; what is compared is the held-out loss of the final weights, computed in one process in full precision, paired
by seed with raw fp32's. As in the paper of AQ-SGD this is fine-tuning: the weights of a seed are first trained for
`--pretrain-steps` in one process on other samples of the same text, in full precision (0: from scratch).

    python benchmarks/bench_convergence.py --data wikitext2-valid.txt --seeds 0,1,2

Every finished run is kept in results/convergence.jsonl; runs that are there already are not repeated. `--table` prints
what is there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import append_result, read_results
from wantrain.comm.loopback import LoopbackJob
from wantrain.config import DataConfig, TrainingConfig
from wantrain.data import Lanes, Samples, TokenFile
from wantrain.errors import TopologyError
from wantrain.model_config import ModelConfig
from wantrain.models import gpt
from wantrain.pipeline.boundary_codecs import CodecSettings
from wantrain.plan import Plan
from wantrain.profile import gpt_profile
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology
from wantrain.training.loop import learning_rate
from wantrain.training.trainer import Batch, Trainer
from wantrain.wire import payload_bytes


class Choice(NamedTuple):
    """The codecs of a run; `replicas` are two where gradients are compressed."""

    forward: str = "raw:fp32"
    backward: str = "raw:fp32"
    gradient: str = "raw:fp32"
    replicas: int = 1


CHOICES = {
    "fp32": Choice(),
    "fp32 2 replicas": Choice(replicas=2),
    **{
        f"{kind} fw{f} bw{b}": Choice(f"{kind}:{f},group=64", f"hadamard:{b},group=64")
        for kind in ("aqsgd", "quantized")
        for f, b in ((4, 8), (3, 6), (2, 4))
    },
    "gradients 4 bit": Choice(gradient="error_feedback:quantized:4", replicas=2),
    "gradients cocktail": Choice(gradient="error_feedback:cocktail:4", replicas=2),
    "aqsgd fw4 bw8, gradients 4 bit": Choice(
        "aqsgd:4,group=64", "hadamard:8,group=64", "error_feedback:quantized:4", replicas=2
    ),
}
BASELINES = {1: "fp32", 2: "fp32 2 replicas"}
STAGES = 4


class Experiment(NamedTuple):
    """What all runs of a comparison share."""

    model: ModelConfig
    training: TrainingConfig
    samples: Samples
    held_out: Samples
    epochs: float
    other: Samples
    """What pretraining sees: the text behind the samples."""
    pretrain_steps: int


def make_experiment(args: argparse.Namespace) -> Experiment:
    """Return the model, its training and its samples."""
    model = ModelConfig(num_layers=4, hidden=args.hidden, num_heads=4, seq_len=args.seq_len, vocab_size=256)
    tokens = TokenFile.open(DataConfig(source=args.data), Path(tempfile.gettempdir()) / "wantrain-bench")
    text = tokens.training(model)
    samples = text.first(args.samples)
    other = replace(text, start=samples.end)
    steps = round(args.epochs * len(samples) / args.batch_size)
    training = TrainingConfig(
        steps=steps, batch_size=args.batch_size, microbatch_size=4, num_lanes=2, learning_rate=args.learning_rate,
        warmup_steps=steps // 20,
    )  # fmt: skip
    held_out = tokens.validation(model).spread(args.validation_samples)
    epochs = steps * args.batch_size / len(samples)
    return Experiment(model, training, samples, held_out, epochs, other, args.pretrain_steps)


def plan_for(experiment: Experiment, choice: Choice, stages: int = STAGES) -> Plan:
    """Plan a run; the topology decides nothing but transports, which loopback has not."""
    workers = [{"name": "w", "count": stages * choice.replicas, "site": "s"}]
    links = [{"within": "s", "bandwidth": "1 Gbit/s", "latency": "1 ms"}]
    topology = Topology.parse({"name": "flat", "worker": workers, "link": links}, TopologyError, "flat")
    training = experiment.training
    return make_plan(
        topology, gpt_profile(experiment.model, training.microbatch_size), batch_size=training.batch_size,
        num_lanes=training.num_lanes, num_stages=stages, num_replicas=choice.replicas, forward_codec=choice.forward,
        backward_codec=choice.backward, gradient_codec=choice.gradient,
    )  # fmt: skip


def pretrained(experiment: Experiment, seed: int) -> list[torch.nn.Module]:
    """Return the layers that every run of a seed begins with."""
    model, other, steps = experiment.model, experiment.other, experiment.pretrain_steps
    batch_size = experiment.training.batch_size
    layers = gpt.build_layers(model, 0, model.num_layers_total, seed)
    whole = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(whole.parameters(), betas=(0.9, 0.95))
    schedule = TrainingConfig(steps=max(1, steps), batch_size=batch_size, learning_rate=3e-3, warmup_steps=20)
    lanes = Lanes(len(other), 1, seed)
    for step in range(steps):
        inputs, targets = other.batch(lanes.draw(step, batch_size)[0])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        optimizer.zero_grad()
        loss: Any = gpt.loss(whole(torch.from_numpy(inputs)), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
    return layers


def train_rank(
    experiment: Experiment,
    plan: Plan,
    job: LoopbackJob,
    rank: int,
    seed: int,
    begin: list[torch.nn.Module],
    kept: dict[int, dict[int, torch.nn.Module]],
) -> None:
    """Train one rank to the end; put its layers, by their indices, into `kept` after each number of steps there."""
    model, training = experiment.model, experiment.training
    trainer = Trainer(
        [copy.deepcopy(layer) for layer in begin], plan, loss=gpt.loss, worker=plan.workers[rank],
        optimizer=partial(torch.optim.AdamW, betas=training.betas, weight_decay=training.weight_decay),
        tied=gpt.tied_parameters, membership=job.member(rank), timeout_s=600.0,
        codec_settings=CodecSettings(sample_shape=(model.seq_len, model.hidden), seed=seed),
    )  # fmt: skip
    lanes = Lanes(len(experiment.samples), training.num_lanes, seed)

    def drawn(step: int) -> list[int]:
        by_lane = lanes.draw(step, training.batch_size)
        return [sample for lane in plan.replicas[trainer.replica].lanes for sample in by_lane[lane]]

    for step in range(training.steps):
        trainer.set_learning_rate(learning_rate(training, step))
        ids = drawn(step)
        inputs, targets = experiment.samples.batch(ids)
        trainer.step(Batch(ids, torch.from_numpy(inputs), torch.from_numpy(targets)), drawn(step + 1))
        if step + 1 in kept:
            kept[step + 1].update(copy.deepcopy(dict(trainer.layers)))
    trainer.close()


def train(
    experiment: Experiment, plan: Plan, seed: int, begin: list[torch.nn.Module], after: Iterable[int]
) -> dict[int, list[torch.nn.Module]]:
    """Train copies of `begin` as planned; return the whole model's layers (replica 0's) after some numbers of steps."""
    job = LoopbackJob(plan.world_size)
    kept: dict[int, dict[int, torch.nn.Module]] = {steps: {} for steps in after}
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            train_rank(experiment, plan, job, rank, seed, begin, kept)
        except BaseException as caught:  # noqa: BLE001  the thread's edge: raised below
            errors.append(caught)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(plan.world_size)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        threads[0].join(0.5)
    if errors:
        raise errors[0]
    return {steps: [layers[index] for index in sorted(layers)] for steps, layers in kept.items()}


@torch.no_grad()
def held_out_loss(layers: list[torch.nn.Module], samples: Samples) -> float:
    """Return the mean loss of final weights, nats per token."""
    total = 0.0
    for sample in range(len(samples)):
        inputs, targets = samples.batch([sample])
        values = torch.from_numpy(inputs)
        for layer in layers:
            values = layer.eval()(values)
        total += float(gpt.loss(values, torch.from_numpy(targets)))
    return total / len(samples)


def identity(experiment: Experiment, text: str, **more: int) -> dict[str, Any]:
    """Return what makes runs comparable."""
    return {
        "model": experiment.model.model_dump(),
        "training": experiment.training.model_dump(exclude={"seed"}, mode="json"),
        "text": Path(text).name,
        "samples": len(experiment.samples),
        "held_out": len(experiment.held_out),
    } | more


def expansion(choice: Choice, experiment: Experiment) -> dict[str, float]:
    """Return how many times fewer bytes than fp32 go each way: later visits, and gradient pieces of 4 MB."""
    shape = (experiment.training.microbatch_size, experiment.model.seq_len, experiment.model.hidden)
    raw, piece = payload_bytes("raw:fp32", shape), (1 << 20,)
    return {
        "forward": round(raw / payload_bytes(choice.forward, shape), 2),
        "backward": round(raw / payload_bytes(choice.backward, shape), 2),
        "gradient": round(payload_bytes("raw:fp32", piece) / payload_bytes(choice.gradient, piece), 2),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table: final held-out loss by choice, and the difference to fp32's paired by seed."""
    losses: dict[str, dict[int, float]] = {}
    for record in records:
        losses.setdefault(record["choice"], {})[record["seed"]] = record["held_out_loss"]
    lines = ["| codecs | held-out loss | against fp32, by seed | mean |", "|---|---|---|---|"]
    for name, by_seed in losses.items():
        base = losses.get(BASELINES[CHOICES[name].replicas], {})
        differences = [by_seed[seed] / base[seed] - 1 for seed in sorted(by_seed) if seed in base]
        shown = ", ".join(f"{100 * one:+.2f} %" for one in differences)
        mean = f"{100 * statistics.mean(differences):+.2f} %" if differences else "–"
        lines.append(f"| {name} | {statistics.mean(by_seed.values()):.4f} | {shown} | {mean} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="a text file or folder")
    parser.add_argument("--choices", default=",".join(CHOICES).replace(", ", "; "), help="comma separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--samples", type=int, default=384, help="of training text")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--validation-samples", type=int, default=128)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--smoke", action="store_true", help="keep no result")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    experiment = make_experiment(args)
    same = identity(experiment, args.data, pretrain_steps=experiment.pretrain_steps)
    known = [] if args.smoke else [one for one in read_results("convergence") if one["experiment"] == same]
    names = [name.replace("; ", ", ") for name in args.choices.split(",")]
    for seed in () if args.table else map(int, args.seeds.split(",")):
        begin = pretrained(experiment, seed)
        for name in names:
            if any(one["choice"] == name and one["seed"] == seed for one in known):
                continue
            began = time.monotonic()
            steps, plan = experiment.training.steps, plan_for(experiment, CHOICES[name])
            loss = held_out_loss(train(experiment, plan, seed, begin, [steps])[steps], experiment.held_out)
            record = {
                "benchmark": "convergence", "choice": name, "seed": seed, "held_out_loss": loss,
                "epochs": experiment.epochs, "times_fewer_bytes": expansion(CHOICES[name], experiment),
                "seconds": round(time.monotonic() - began, 1), "experiment": same,
            }  # fmt: skip
            known.append(record)
            if not args.smoke:
                append_result("convergence", record)
            print(f"{name}, seed {seed}: {loss:.4f} ({record['seconds']} s)", flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
