"""Start all workers of a job on this machine, inside the emulated WAN or plainly, and watch them to the end.

    wantrain launch (outside)   reads and checks everything, writes the run directory, becomes the sandbox
      └─ wantrain launch --inside RUN    builds the network, measures it, and starts
           ├─ torchrun … -m wantrain train … --worker paris-0      in paris-0's namespace
           └─ torchrun … -m wantrain train … --worker tokyo-0      in tokyo-0's namespace

It adds nothing to training: each worker is an ordinary torchrun process. Ctrl-C asks for an agreed last step by a file
that rank 0 looks for; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from wantrain.config import RunConfig
from wantrain.errors import ConfigError, EmulationError, RunError, UserError, WantrainError
from wantrain.fact import read_json, write_text
from wantrain.launch.progress import Progress
from wantrain.launch.torchrun import MASTER_PORT, single_host_argv, train_argv, with_this_python, worker_argv
from wantrain.netem.check import RATE_TOLERANCE, check_network
from wantrain.netem.commands import INTERFACE
from wantrain.netem.emulate import EmulatedNetwork, machine_commands
from wantrain.netem.sandbox import die_with_parent, enter_sandbox, inside_sandbox, why_no_sandbox
from wantrain.plan import Plan
from wantrain.report.page import write_report
from wantrain.report.tables import print_network, print_plan, print_summary
from wantrain.run_directory import LinkMeasurement, NetworkRecord, RunDirectory
from wantrain.topology import Topology
from wantrain.training.checkpoint import CheckpointFolder
from wantrain.training.job import (
    judged,
    load_config,
    open_data,
    profile_of,
    resolve,
    write_run_directory,
    write_summary,
)
from wantrain.training.watch import check_reach, check_sinks
from wantrain.trigram import trigram_loss

_POLL_S = 0.25
_OTHERS_WITHIN_S = 5.0
"""Chosen: torchrun looks at its worker ten times a second, and takes a second or two to say how it ended."""

_TORCHRUN_EXIT = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")
"""How torchrun's own account of a failure names rank and exit status."""

_END_WITHIN_S = 20.0
"""Chosen: a worker that was told to end and has not by then is killed."""


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain launch`."""
    if args.inside is not None:
        return _watch(RunDirectory(args.inside), args)
    run_directory = prepare(args)
    if not args.no_emulation:
        _enter(run_directory, args)
    return _watch(run_directory, args)


def _enter(run_directory: RunDirectory, args: argparse.Namespace) -> NoReturn:
    """Become the sandbox; this process's id stays, so that killing it takes everything down."""
    inside = [sys.executable, "-m", "wantrain", "launch", args.config, "--inside", str(run_directory.path)]
    inside += ["--dilation", str(args.dilation), "--rate-tolerance", str(100 * args.rate_tolerance)]
    inside += ["--resume"] if args.resume else []
    enter_sandbox(inside)


def prepare(args: argparse.Namespace) -> RunDirectory:
    """Read and check everything that can be wrong before anything starts; write the run directory."""
    if args.no_emulation and args.dilation != 1:
        raise ConfigError("--dilation slows the emulated network; it can't go with --no-emulation")
    if args.no_emulation and args.rate_tolerance != RATE_TOLERANCE:
        raise ConfigError("--rate-tolerance judges the emulated network; it can't go with --no-emulation")
    config = load_config(args.config, args.data, args.topology, args.set)
    run = RunDirectory(args.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    check_sinks(config.watch)
    job = resolve(config, args.plan)
    if args.resume:
        if not run.config.exists():
            raise ConfigError(f"nothing to resume in {run.path}; give the run's directory with --run-dir")
    elif run.path.exists() and any(run.path.iterdir()):
        raise ConfigError(f"{run.path} is not empty; give another directory with --run-dir, or go on with --resume")
    if not args.no_emulation:
        check_reach(config.watch)
        reason = why_no_sandbox()
        if reason is not None:
            raise EmulationError(reason)
        machine_commands(job.topology, args.dilation)
    open_data(config)  # turns the text into tokens once, before every worker would
    write_run_directory(run, job)
    run.stop.unlink(missing_ok=True)
    return run


def _watch(run: RunDirectory, args: argparse.Namespace) -> int:
    """Start the workers, show how it goes, and report."""
    plan, config, topology = Plan.load(run.plan), RunConfig.load(run.config), Topology.load(run.topology)
    print_plan(plan, topology)
    with ExitStack() as undo:
        network = undo.enter_context(EmulatedNetwork(topology, args.dilation)) if inside_sandbox() else None
        if network is not None:
            _measure(network, run, args.rate_tolerance)
        workers = undo.enter_context(_started(run, plan, topology, network, args))
        steps = CheckpointFolder(run.checkpoints).steps() if args.resume else []
        interrupted = _follow(run, plan, config, workers, network, steps[0] if steps else 0)
    _sum_up(run, config, plan, args.dilation)
    write_report(run)
    print_summary(run, interrupted)
    return 130 if interrupted else 0


def _sum_up(run: RunDirectory, config: RunConfig, plan: Plan, dilation: float) -> None:
    """Write the run's figures, and the trigram model's loss on the very tokens that the model was judged on."""
    _, samples, held_out = open_data(config)
    held_out = judged(held_out, plan)
    steps = run.read_steps(0)
    seconds = sum(record.step_s for record in steps)
    write_summary(
        run,
        seconds=round(seconds, 3),
        tokens_per_s=round(sum(record.tokens for record in steps) / seconds, 1) if seconds else 0.0,
        trigram_loss=round(trigram_loss(samples, held_out, config.model.vocab_size), 4),
        parameters=profile_of(config).parameter_bytes // 4,
        workers=plan.world_size,
        machine=f"{len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        dilation=dilation,
    )


def _measure(network: EmulatedNetwork, run: RunDirectory, rate_tolerance: float) -> None:
    """Hold the network against what was asked before anything depends on it."""
    check = check_network(network, rate_tolerance=rate_tolerance)
    links = [
        LinkMeasurement(**{name: getattr(link, name) for name in LinkMeasurement.model_fields}) for link in check.links
    ]
    record = NetworkRecord(delay_by=check.delay_by, dilation=check.dilation, links=tuple(links))
    write_text(run.network, record.model_dump_json(indent=1) + "\n")
    print_network(record)
    check.raise_if_rate_is_wrong()
    if complaint := check.latency_complaint():  # seen, said and in the report; a moment's load must not end a run
        print(f"wantrain: {complaint}", file=sys.stderr)


@contextmanager
def _started(
    run: RunDirectory, plan: Plan, topology: Topology, network: EmulatedNetwork | None, args: argparse.Namespace
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start torchrun for every worker; on the way out end what still runs, gently first."""
    options = ["--run-dir", str(run.path), "--plan", str(run.plan), "--topology", str(run.topology)]
    options += ["--dilation", str(args.dilation)] + (["--resume"] if args.resume else [])
    train = train_argv(str(run.config), *options)
    run.logs.mkdir(parents=True, exist_ok=True)
    workers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        if network is None:
            workers["all"] = _start(single_host_argv(plan, _free_port(), train), run.logs / "all.log")
        else:
            for name in plan.workers:
                argv = worker_argv(plan, name, network.address(plan.workers[0]), MASTER_PORT, train)
                workers[name] = _start(argv, run.logs / f"{name}.log", network, name)
        yield workers
        _end(workers.values(), _END_WITHIN_S)
    except BaseException:
        _end(workers.values(), 0.0)  # their workers die with them
        raise


def _start(
    argv: Sequence[str], log: Path, network: EmulatedNetwork | None = None, worker: str = ""
) -> subprocess.Popen[bytes]:
    """Start torchrun with its output in a log; in a session of its own, so that Ctrl-C reaches only the launcher."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    full = with_this_python(argv)
    if log.exists():  # an earlier launch's, kept under the time of its last line
        log.rename(log.with_name(f"{log.stem}.{datetime.fromtimestamp(log.stat().st_mtime):%Y%m%d-%H%M%S}.log"))
    with log.open("wb") as file:
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        how["start_new_session"] = True
        if network is None:
            return subprocess.Popen(full, env=environment, preexec_fn=die_with_parent, **how)
        return network.popen(worker, full, env=environment | {"GLOO_SOCKET_IFNAME": INTERFACE}, **how)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _follow(
    run: RunDirectory,
    plan: Plan,
    config: RunConfig,
    workers: Mapping[str, subprocess.Popen[bytes]],
    network: EmulatedNetwork | None,
    first_step: int,
) -> bool:
    """Show progress until all workers have ended; return whether the user interrupted. Raise RunError if one fails."""
    interrupts = _count_interrupts()
    asked, num_notes = False, len(_notes(run))
    with Progress(run, plan, config.training.steps, first_step) as progress:
        while any(worker.poll() is None for worker in workers.values()):
            progress.update()
            for note in _notes(run)[num_notes:]:
                progress.note(note)
                num_notes += 1
            if network is not None:
                network.raise_if_broken()
            _raise_if_failed(run, plan, workers)
            if interrupts and not asked:
                run.stop.touch()
                progress.note("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
                asked = True
            if len(interrupts) > 1:
                raise KeyboardInterrupt
            time.sleep(_POLL_S)
        progress.update()
    _raise_if_failed(run, plan, workers)
    return bool(read_json(run.summary, ConfigError).get("interrupted"))


def _notes(run: RunDirectory) -> list[str]:
    return run.notes.read_text(encoding="utf-8").splitlines() if run.notes.exists() else []


def _count_interrupts() -> list[int]:
    """From now on, note SIGINT and SIGTERM in the list that is returned instead of dying of them."""
    seen: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: seen.append(number))
    return seen


def _raise_if_failed(run: RunDirectory, plan: Plan, workers: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Raise the error of the worker that failed for a reason of its own, once one has ended badly."""
    if not any(worker.poll() for worker in workers.values()):
        return
    deadline = time.monotonic() + _OTHERS_WITHIN_S  # who lost a peer often ends before the peer's own torchrun does
    while any(worker.poll() is None for worker in workers.values()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    ended = [name for name, worker in workers.items() if worker.poll()]
    raise min((_failure(run, plan, name) for name in ended), key=lambda failure: failure[0])[1]


def _failure(run: RunDirectory, plan: Plan, name: str) -> tuple[int, WantrainError]:
    """Return a worker's error from its log, and how far it is from a cause: a kill, bad input, a lost peer."""
    log = run.logs / f"{name}.log"
    text = log.read_text(errors="replace")
    said = [line.removeprefix("wantrain: ") for line in text.splitlines() if line.startswith("wantrain: ")]
    exits = [(int(status), int(rank)) for rank, status in _TORCHRUN_EXIT.findall(text)]
    killed = [(-status, rank) for status, rank in exits if status < 0 and -status != signal.SIGTERM]
    if killed:
        number, rank = killed[0]
        victim = name if name in plan.workers else plan.workers[rank]
        return 0, RunError(f"worker '{victim}' was killed (signal {number}); go on with --resume (its log: {log})")
    reason = said[0] if said else f"its log, {log}, says why"
    if any(status == UserError.exit_status for status, _ in exits):
        return 1, UserError(f"worker '{name}' ended: {reason}")
    return 2, RunError(f"worker '{name}' failed: {reason}; go on with --resume (its log: {log})")


def _end(workers: Iterable[subprocess.Popen[bytes]], within_s: float) -> None:
    """End what still runs: ask, wait, kill."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + within_s
    for worker in running:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
