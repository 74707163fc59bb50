"""`wantrain train`: one worker of a job, from its run file to the last step. The loop itself is `train`.

What a step computes follows from the step number, the weights and the optimizer's state alone: the samples drawn, the
learning rate, dropout. So a run that was killed goes on from a checkpoint with the very losses it would have had.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NoReturn

import torch

from wantrain.codecs.codec import prepare_codecs
from wantrain.config import RunConfig, TrainingConfig
from wantrain.data import Lanes, Samples
from wantrain.errors import ConfigError, PlanError, WantrainError
from wantrain.fact import append_line
from wantrain.netem.sandbox import die_with_parent
from wantrain.pipeline.boundary_codecs import CodecSettings
from wantrain.plan import Plan
from wantrain.run_directory import LinkTraffic, RunDirectory, StepRecord, ValidationRecord
from wantrain.topology import Topology
from wantrain.training.architecture import architecture_of
from wantrain.training.device import open_device
from wantrain.training.job import Job, judged, load_config, open_data, resolve, write_run_directory, write_summary
from wantrain.training.metrics import MetricsSink, RunFacts, RunLines, announce
from wantrain.training.quantized_adam import QuantizedAdam
from wantrain.training.run_checkpoints import RunCheckpoints
from wantrain.training.trainer import Batch, Trainer
from wantrain.training.watch import Watch, check_sinks, make_sinks

_SECOND_REQUEST_S = 3.0
"""Chosen: in a terminal Ctrl-C reaches the worker and torchrun, which at once sends it on; a later one is another."""

_NOTEWORTHY_S = 5.0

_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 1 << 20
"""Chosen: below it lie small tensors, for which a system call each would cost time."""


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, then a cosine down to its final share."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    low = training.final_learning_rate_ratio
    return training.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain train` in one process of a job."""
    config = load_config(args.config, args.data, args.topology, args.set)
    check_sinks(config.watch)
    job = resolve(config, args.plan)
    run_directory = RunDirectory(args.run_dir or f"runs/{config.name}")
    worker = args.worker or own_worker(job.plan, job.topology)
    is_resumed = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if job.plan.rank_of(worker) == 0 and args.plan != str(run_directory.plan):  # the launcher has written it
        _begin_run_directory(run_directory, job, is_resumed)
    set_up_process(config.training.threads)
    try:
        with _session(job, worker, args.dilation, run_directory) as trainer:
            stop_requested = _StopRequests(run_directory, trainer.rank)
            train(trainer, job, run_directory, is_resumed, stop_requested, make_sinks(config.watch))
    except (WantrainError, KeyboardInterrupt) as caught:
        _die(caught)
    return 0


def set_up_process(threads: int) -> None:
    """Set what holds for a whole worker process: threads, small numbers, how memory is taken and given back, and that
    it ends when the torchrun that started it does.

    glibc keeps freed blocks of up to 32 MB for reuse, in an arena for each thread, so that payloads made in one thread
    and freed in another add up to a quarter more than is ever in use (measured: tests/training/test_memory.py). With a
    fixed threshold every larger block is returned when it is freed. So it has to be taken anew, which costs a quarter
    as much in pages of 2 MB (torch reads the wish for them when it first makes a tensor).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    die_with_parent()


def _die(caught: WantrainError | KeyboardInterrupt) -> NoReturn:
    """Say why in one line and end at once: the channels' threads wait for peers that may be gone."""
    status = caught.exit_status if isinstance(caught, WantrainError) else 130
    print(f"wantrain: {caught or 'interrupted'}", file=sys.stderr, flush=True)
    os._exit(status)


def own_worker(plan: Plan, topology: Topology) -> str:
    """Return who this process is: by the host's address and the local rank, else by torchrun's rank."""
    addresses = {name: topology.worker(name).address for name in plan.workers}
    here = [name for name, address in addresses.items() if address is not None and _is_local(address)]
    local_rank, rank = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("RANK", "0"))
    if here:
        if local_rank >= len(here):
            raise PlanError(f"this host has {len(here)} workers of the plan, and local rank {local_rank}; use --worker")
        return here[local_rank]
    if rank >= plan.world_size:
        raise PlanError(f"the plan is for {plan.world_size} processes (this one has rank {rank}); start as many")
    return plan.workers[rank]


def own_address(topology: Topology, worker: str) -> str | None:
    """Return the worker's address in the topology, if it is one of this host's."""
    address = topology.worker(worker).address
    return address if address is not None and _is_local(address) else None


def _is_local(address: str) -> bool:
    """Say whether an address is one of this host's: only those can be bound."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def _begin_run_directory(run_directory: RunDirectory, job: Job, is_resumed: bool) -> None:
    """Write the run's files, unless an earlier run is there that was not asked to go on."""
    if run_directory.metrics(0).exists() and not is_resumed:
        raise ConfigError(f"{run_directory.path} holds a run; go on with --resume, or give another --run-dir")
    write_run_directory(run_directory, job)


@contextmanager
def _session(job: Job, worker: str, dilation: float, run_directory: RunDirectory) -> Iterator[Trainer]:
    """Join the job, and leave it together with the others if all went well."""
    config, training = job.config, job.config.training
    own = architecture_of(config.model)
    device = open_device(job.topology.worker(worker).device, f"worker '{worker}'", "change the topology")
    if device.type == "cpu":
        _prepare_codecs(job.plan, job.plan.rank_of(worker), run_directory)
    trainer = Trainer(
        lambda first, end: own.build_layers(config.model, first, end, training.seed),
        job.plan,
        loss=own.loss,
        optimizer=partial(make_optimizer, training),
        worker=worker,
        clip_norm=training.clip_norm,
        autocast=partial(_autocast, training, device),
        recompute=training.recompute,
        tied=own.tied_parameters,
        before_forward=lambda layers, step, samples: own.set_dropout_keys(layers, training.seed, step, samples),
        device=device,
        timeout_s=_patience_s(job, dilation),
        address=own_address(job.topology, worker),
        dilation=dilation,
        codec_settings=codec_settings(config, run_directory, worker),
    )
    yield trainer
    trainer.close()


def _prepare_codecs(plan: Plan, rank: int, run_directory: RunDirectory) -> None:
    """Compile the codecs' kernels before anybody waits for this rank, and say so where it took long."""
    began_s = time.monotonic()
    prepare_codecs(plan.codecs)
    took_s = time.monotonic() - began_s
    if took_s > _NOTEWORTHY_S:
        said = f"compiled the codecs for this processor in {took_s:.0f} s; later runs find them ready"
        announce(run_directory, rank, said)


def codec_settings(config: RunConfig, run_directory: RunDirectory, worker: str) -> CodecSettings:
    """Return what a run file says that codecs need to know."""
    budget = config.buffers

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        append_line(run_directory.notes, f"{worker}: {text}")

    return CodecSettings(
        sample_shape=(config.model.seq_len, config.model.hidden),
        seed=config.training.seed,
        ram_bytes=budget.ram_bytes,
        file_bytes=budget.file_bytes,
        folder=run_directory.buffers,
        device_bytes=budget.device_bytes,
        say=say,
    )


def _patience_s(job: Job, dilation: float) -> float:
    """Return how long to wait for a peer: what the run file says, on top of the steps that may have to pass first."""
    expected_s = 3 * job.plan.prediction.step_s if job.plan.prediction is not None else 0.0
    return (job.config.parallel.timeout_s + expected_s) * dilation


def _autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if training.dtype == "bf16" else nullcontext()


def make_optimizer(training: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The run file's optimizer; matrices decay, gains do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rate, betas = training.learning_rate, training.betas
    if training.optimizer == "quantized_adam":
        return QuantizedAdam(groups, lr=rate, betas=betas, warmup_steps=training.variance_steps)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class _StopRequests:
    """Ctrl-C, SIGTERM or the run's stop file: end after the step at hand, all ranks after the same one."""

    def __init__(self, run_directory: RunDirectory, rank: int) -> None:
        self._file = run_directory.stop if rank == 0 else None
        self._signalled_at_s: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        now_s = time.monotonic()
        if self._signalled_at_s is None:
            self._signalled_at_s = now_s
        elif now_s - self._signalled_at_s > _SECOND_REQUEST_S:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        """Say whether this rank was asked to stop."""
        return self._signalled_at_s is not None or (self._file is not None and self._file.exists())


def train(
    trainer: Trainer,
    job: Job,
    run_directory: RunDirectory,
    is_resumed: bool,
    stop_requested: Callable[[], bool] = lambda: False,
    sinks: Sequence[MetricsSink] = (),
) -> None:
    """Train to the last step, or to the one after which somebody asked to stop; `sinks` are told how it goes."""
    config = job.config
    tokens, samples, held_out = open_data(config)
    held_out = judged(held_out, job.plan)
    trainer.agree(
        {
            "the plan": job.plan.model_dump_json(exclude={"prediction"}),
            "the training text": tokens.digest,
            "the run file": _what_all_share(config),
        }
    )
    training = config.training
    checkpoints = RunCheckpoints(trainer, config, run_directory)
    is_resumed = any(trainer.gather(is_resumed))  # a machine that came back counts no restart of its own
    first = checkpoints.resume() if is_resumed else 0
    if trainer.rank == 0:
        run_directory.stop.unlink(missing_ok=True)  # an earlier run's
    lanes = Lanes(len(samples), training.num_lanes, training.seed)
    facts = _facts(trainer, job, run_directory, first)
    with Watch(facts, sinks, RunLines(run_directory.path)) as watch:
        for step in range(first, training.steps):
            trainer.stop_requested = stop_requested()
            trainer.set_learning_rate(learning_rate(training, step))
            batch = replica_batch(trainer, samples, lanes.draw(step, training.batch_size))
            result = trainer.step(batch, _own_samples(trainer, lanes.draw(step + 1, training.batch_size)))
            watch.step(_record(trainer, job, run_directory.network.exists()))
            if step % training.record_every == 0:
                watch.timeline(step, trainer.recorder)
            is_last = step + 1 == training.steps or result.stop_requested
            if is_last or (step + 1) % config.checkpoint.every == 0:  # first: who was asked to stop may not be awaited
                checkpoints.save(step + 1)
            if is_last or (training.validate_every and (step + 1) % training.validate_every == 0):
                loss = validate(trainer, held_out)
                watch.validation(ValidationRecord(step=step, validation_loss=loss))
                if trainer.rank == 0:
                    write_summary(
                        run_directory, validation_loss=loss, steps=step + 1, interrupted=result.stop_requested
                    )
            if result.stop_requested:
                if trainer.rank == 0:
                    watch.note(f"stopped after step {step + 1} of {training.steps}; go on with --resume")
                return


def _facts(trainer: Trainer, job: Job, run_directory: RunDirectory, first_step: int) -> RunFacts:
    """Return what sinks are told before the first step."""
    return RunFacts(
        run_directory.path.resolve().name,
        trainer.rank,
        job.plan,
        first_step=first_step,
        folder=run_directory.path,
        config=job.config.model_dump(mode="json"),
        address=job.topology.worker(job.plan.workers[trainer.rank]).address,
    )


def _what_all_share(config: RunConfig) -> str:
    """Return the run file without what is each host's own: paths, and how it is watched."""
    return config.model_dump_json(exclude={"data": {"source"}, "parallel": {"topology", "profile"}, "watch": True})


def replica_batch(trainer: Trainer, samples: Samples, drawn: list[list[int]]) -> Batch:
    """Return the samples of the lanes that this rank's replica was dealt."""
    ids = _own_samples(trainer, drawn)
    inputs, targets = samples.batch(ids)
    return Batch(ids, torch.from_numpy(inputs), torch.from_numpy(targets))


def _own_samples(trainer: Trainer, drawn: list[list[int]]) -> list[int]:
    """Return the samples of the lanes that this rank's replica was dealt, lane by lane."""
    return [sample for lane in trainer.plan.replicas[trainer.replica].lanes for sample in drawn[lane]]


def validate(trainer: Trainer, held_out: Samples) -> float:
    """Return the held-out loss. Each replica takes a share, a few microbatches at a time: no more than are in flight
    when training, so that no more memory is needed."""
    plan, share = trainer.plan, len(held_out) // len(trainer.plan.replicas)
    at_once = plan.microbatch_size * plan.stages[0].max_in_flight
    own = range(trainer.replica * share, (trainer.replica + 1) * share)
    total = 0.0
    for at in range(0, share, at_once):
        ids = own[at : at + at_once]
        inputs, targets = held_out.batch(ids)
        total += len(ids) * trainer.evaluate(Batch(ids, torch.from_numpy(inputs), torch.from_numpy(targets)))
    return total / share


def _link_use(trainer: Trainer, topology: Topology, is_emulated: bool) -> dict[str, LinkTraffic]:
    """Return what was sent by peer. An emulated link was busy at least as long as its rate needs for the bytes: the
    kernel takes small payloads at once and sends them later, so the time until it took them says too little."""
    own, used = trainer.plan.workers[trainer.rank], {}
    for peer, sent in trainer.traffic().items():
        least_s = sent.wire_bytes / topology.send_limit_bytes_per_s(own, peer) if is_emulated else 0.0
        used[peer] = sent.model_copy(update={"busy_s": max(sent.busy_s, least_s)})
    return used


def _record(trainer: Trainer, job: Job, is_emulated: bool) -> StepRecord:
    tokens = job.config.training.batch_size * job.config.model.seq_len
    return trainer.record(tokens).model_copy(update={"sent": _link_use(trainer, job.topology, is_emulated)})
