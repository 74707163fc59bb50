"""`wantrain emulate`: a command in every worker's namespace, or a look at what would be built and what it gives.

The first process only reads the topology; then it replaces itself by a sandbox that runs the very same command line
again, inside. There the network is built, and the command started once per worker with what torchrun, gloo and NCCL
read from the environment. The first worker to fail ends the others: a job that lost a worker can only wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import IO, Any

from wantrain.errors import EmulationError, TopologyError
from wantrain.netem.check import NetworkCheck, check_network
from wantrain.netem.commands import INTERFACE
from wantrain.netem.emulate import EmulatedNetwork, machine_commands
from wantrain.netem.sandbox import enter_sandbox, inside_sandbox
from wantrain.resources import find_config
from wantrain.topology import Topology
from wantrain.units import format_bandwidth, format_time

MASTER_PORT = 29500
"""torchrun's own default; a namespace has all its ports to itself."""

_POLL_S = 0.05
_READ_WITHIN_S = 2.0
"""Chosen: what remains in a pipe is read at once; longer only waits for a process that has left its group."""

_END_WITHIN_S = 10.0
"""Chosen: what a worker may take to write a checkpoint after Ctrl-C before it is told more firmly."""


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain emulate`; return the exit status."""
    topology = Topology.load(find_config("topologies", args.topology, TopologyError))
    if args.only is not None:
        topology.worker(args.only)
    if args.dry_run:
        _print_commands(topology, args.dilation, args.json)
        return 0
    if not args.command and not args.check:
        raise EmulationError("nothing to do; give --check, --dry-run, or a command after '--'")
    if not inside_sandbox():
        enter_sandbox([sys.executable, "-m", "wantrain", *args.argv])
    signal.signal(signal.SIGTERM, _terminate)
    with EmulatedNetwork(topology, args.dilation) as network:
        if args.check:
            _check(network, args.all_pairs, args.rate_tolerance, args.json)
        return _run_command(network, args.command, args.only) if args.command else 0


def _terminate(signum: int, _: FrameType | None) -> None:
    sys.exit(128 + signum)


def _print_commands(topology: Topology, dilation: float, as_json: bool) -> None:
    built = machine_commands(topology, dilation)
    if as_json:
        lines = {worker: [vars(queue) for queue in queues] for worker, queues in built.delay_lines.items()}
        commands = [command.argv for command in built.commands]
        print(json.dumps({"dilation": dilation, "commands": commands, "delay_lines": lines}))
        return
    print(f"# {topology.name}, dilation {dilation:g}: inside private user, mount, network and process namespaces")
    for command in built.commands:
        print(command)
    for worker, argv in built.delay_line_argvs().items():
        print("ip netns exec", worker, *argv, "&")


def _check(network: EmulatedNetwork, all_pairs: bool, rate_tolerance: float, as_json: bool) -> None:
    show = _progress_line() if sys.stderr.isatty() else lambda _: None
    check = check_network(network, all_pairs=all_pairs, rate_tolerance=rate_tolerance, progress=show)
    show("")
    print(json.dumps(check.as_json()) if as_json else "\n".join(check_lines(check)), flush=True)
    check.raise_if_wrong()


def _progress_line() -> Callable[[str], None]:
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def check_lines(check: NetworkCheck) -> Iterator[str]:
    """Yield the table of a check, asked beside measured."""
    how = {"netem": "netem", "nfqueue": "delay lines on NFQUEUE"}[check.delay_by]
    yield f"{check.topology}: delay by {how}, dilation {check.dilation:g}"
    yield f"{'from':<16}{'to':<16}{'payload asked':>16}{'measured':>14}{'one way asked':>16}{'measured':>12}"
    for link in check.links:
        rates = f"{format_bandwidth(link.asked_bytes_per_s):>16}{format_bandwidth(link.measured_bytes_per_s):>14}"
        times = f"{format_time(link.asked_latency_s):>16}{format_time(link.measured_latency_s):>12}"
        yield f"{link.source:<16}{link.target:<16}{rates}{times}{_unsteady(link.measured_jitter_s, link)}"
    for up in check.uplinks:
        rates = f"{format_bandwidth(up.asked_bytes_per_s):>16}{format_bandwidth(up.measured_bytes_per_s):>14}"
        yield f"{up.worker:<16}{'(all)':<16}{rates}"


def _unsteady(measured_jitter_s: float, link: Any) -> str:
    """Show jitter and loss where they were asked for."""
    jitter = f"  jitter {format_time(measured_jitter_s)} of {format_time(link.asked_jitter_s)}"
    loss = f"  loss {link.measured_loss:.2%} of {link.asked_loss:.2%}"
    return (jitter if link.asked_jitter_s else "") + (loss if link.asked_loss else "")


def worker_environment(network: EmulatedNetwork, worker: str) -> dict[str, str]:
    """Return what a worker's process finds in its environment: who it is, and where the others are."""
    names = [one.name for one in network.topology.workers]
    return dict(os.environ) | {
        "RANK": str(names.index(worker)),
        "WORLD_SIZE": str(len(names)),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": network.address(names[0]),
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "WANTRAIN_WORKER": worker,
    }


def _run_command(network: EmulatedNetwork, command: Sequence[str], only: str | None) -> int:
    if only is not None:
        return _run_alone(network, command, only)
    width = max(len(worker.name) for worker in network.topology.workers)
    processes, readers = [], []
    for worker in network.topology.workers:
        env = worker_environment(network, worker.name)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = network.popen(worker.name, command, env=env, start_new_session=True, **pipes)
        processes.append(process)
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            readers.append(
                threading.Thread(target=_prefix, args=(pipe, out, f"{worker.name:<{width}} | "), daemon=True)
            )
            readers[-1].start()
    with _ending(processes):
        status = _first_failure(network, processes)
    deadline = time.monotonic() + _READ_WITHIN_S
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))
    return status


def _run_alone(network: EmulatedNetwork, command: Sequence[str], worker: str) -> int:
    """Run for one worker, which has the terminal to itself: Ctrl-C is for the command there, a shell for instance."""
    process = network.popen(worker, command, env=worker_environment(network, worker))
    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _ending([process]):
        return _first_failure(network, [process])


def _prefix(pipe: IO[bytes], out: IO[str], prefix: str) -> None:
    with pipe:
        for line in pipe:
            out.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
            out.flush()


def _first_failure(network: EmulatedNetwork, processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended well, or one has not; return its status."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = next((status for status in statuses if status), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if None not in statuses:
            return 0
        network.raise_if_broken()
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _ending(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind: interrupt on Ctrl-C, terminate on anything else, kill what does not end in time."""
    gently = signal.SIGTERM
    try:
        yield
    except KeyboardInterrupt:
        gently = signal.SIGINT
        raise
    finally:
        for signum in (gently, signal.SIGKILL):
            _signal_all(processes, signum)
            _await_all(processes, _END_WITHIN_S)


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    """Signal each process with its whole group, where it leads one: a shell's children too, that outlive the shell."""
    for process in processes:
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:  # it leads none, or all of it has ended
            process.send_signal(signum)


def _await_all(processes: Sequence[subprocess.Popen[bytes]], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
