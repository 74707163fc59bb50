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
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from wantrain.config import RunConfig
from wantrain.errors import ConfigError, EmulationError
from wantrain.fact import write_text
from wantrain.launch.tail import keep_earlier
from wantrain.launch.torchrun import MASTER_PORT, single_host_argv, train_argv, with_this_python, worker_argv
from wantrain.launch.watch import END_WITHIN_S, end, follow, sum_up, write_page
from wantrain.netem.check import RATE_TOLERANCE, check_network
from wantrain.netem.commands import INTERFACE
from wantrain.netem.emulate import EmulatedNetwork, machine_commands
from wantrain.netem.sandbox import die_with_parent, enter_sandbox, inside_sandbox, why_no_sandbox
from wantrain.plan import Plan
from wantrain.report.tables import print_network, print_plan, print_summary
from wantrain.run_directory import LinkMeasurement, NetworkRecord, RunDirectory
from wantrain.topology import Topology
from wantrain.training.job import (
    load_config,
    new_run_directory,
    open_data,
    resolve,
    write_run_directory,
)
from wantrain.training.watch import check_reach, check_sinks


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
    run = new_run_directory(config, args.run_dir, args.resume)
    check_sinks(config.watch)
    job = resolve(config, args.plan)
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
        steps = run.saved_steps() if args.resume else []
        interrupted = follow(
            run,
            plan,
            config,
            workers,
            ask_to_stop=run.stop.touch,
            check=network.raise_if_broken if network is not None else lambda: None,
            first_step=steps[0] if steps else 0,
        )
    sum_up(run, config, plan, args.dilation)
    write_page(run)
    print_summary(run, interrupted)
    return 130 if interrupted else 0


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
        end(workers.values(), END_WITHIN_S)
    except BaseException:
        end(workers.values(), 0.0)  # their workers die with them
        raise


def _start(
    argv: Sequence[str], log: Path, network: EmulatedNetwork | None = None, worker: str = ""
) -> subprocess.Popen[bytes]:
    """Start torchrun with its output in a log; in a session of its own, so that Ctrl-C reaches only the launcher."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    full = with_this_python(argv)
    keep_earlier(log)
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
