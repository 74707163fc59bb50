"""The emulated WAN as a context manager, to be used inside a sandbox.

    with EmulatedNetwork(topology, dilation=4) as network:
        process = network.popen("oregon-0", ["iperf3", "-s"])

Entering builds every namespace, class and queue and starts the delay lines; leaving takes them down. What dies without
leaving is taken down by the sandbox. A delay line that ends early stops all traffic to its worker, so whoever waits on
workers also asks `raise_if_broken`: a broken network is an error, never a silent stall.
"""

from __future__ import annotations

import functools
import itertools
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any, Self

from wantrain.errors import EmulationError
from wantrain.netem.commands import HUB, Command, NetworkCommands, network_commands
from wantrain.netem.delayline import READY
from wantrain.netem.sandbox import inside_sandbox, run_in_sandbox_argv, search_path
from wantrain.topology import Topology

_READY_WITHIN_S = 30.0
"""Chosen: a delay line is up in a tenth of a second; a machine with all its processors busy takes longer."""

_PACKAGE = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables"}


class EmulatedNetwork:
    """A topology as real namespaces and queues, with rates divided and times multiplied by `dilation`.

    Raises EmulationError outside a sandbox, and where this machine lacks what the topology needs.
    """

    def __init__(self, topology: Topology, dilation: float = 1.0) -> None:
        self.topology, self.dilation = topology, dilation
        self.has_netem = kernel_has_netem()
        self.commands = machine_commands(topology, dilation)
        self._delay_lines: dict[str, subprocess.Popen[bytes]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        if not inside_sandbox():
            raise EmulationError(
                "an emulated network is built inside a sandbox only, so that nothing of it can stay behind; start this"
                " program with 'python -m wantrain.netem.sandbox -- …'"
            )
        with ExitStack() as undo:
            undo.callback(self._delete_namespaces)
            run_commands(self.commands.commands)
            undo.callback(self._stop_delay_lines)
            self._start_delay_lines(self.commands)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def address(self, worker: str) -> str:
        """Return a worker's address inside the network."""
        return self.commands.addresses[self.topology.worker(worker).name]

    def popen(self, worker: str, argv: Sequence[str], **popen_kwargs: Any) -> subprocess.Popen[Any]:
        """Start a process in a worker's network namespace; the arguments are those of subprocess.Popen."""
        inside = ["ip", "netns", "exec", self.topology.worker(worker).name, *argv]
        return subprocess.Popen(inside, **popen_kwargs)

    def raise_if_broken(self) -> None:
        """Raise EmulationError if a delay line has ended, since nothing reaches its worker any more."""
        for worker, line in self._delay_lines.items():
            if line.poll() is not None:
                raise EmulationError(
                    f"the emulated network is broken: the delay line of worker '{worker}' has ended (status"
                    f" {line.returncode}), and nothing reaches it any more; start the run again"
                )

    def _start_delay_lines(self, commands: NetworkCommands) -> None:
        for worker, argv in commands.delay_line_argvs().items():
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self._delay_lines[worker] = self.popen(worker, argv, start_new_session=True, **pipes)
        deadline = time.monotonic() + _READY_WITHIN_S
        for worker, line in self._delay_lines.items():
            _await_ready(worker, line, deadline)

    def _stop_delay_lines(self) -> None:
        for line in self._delay_lines.values():
            line.kill()
        for line in self._delay_lines.values():
            line.communicate()
        self._delay_lines.clear()

    def _delete_namespaces(self) -> None:
        for name in (HUB, *self.commands.addresses):
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def machine_commands(topology: Topology, dilation: float = 1.0) -> NetworkCommands:
    """Return the commands that build `topology` on this machine, by netem or by delay lines as its kernel allows."""
    netem = kernel_has_netem()
    latency = any(link.latency_s > 0 for _, _, link in topology.pairs())
    iptables = working_iptables() if latency and not netem else "iptables"
    return network_commands(topology, has_netem=netem, dilation=dilation, iptables=iptables)


@functools.cache
def kernel_has_netem() -> bool:
    """Try in a sandbox whether this kernel has sch_netem."""
    return _works("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")


@functools.cache
def working_iptables() -> str:
    """Return the name of an iptables that can queue packets on this kernel: the legacy one, else nftables' own."""
    rule = ("-t", "mangle", "-A", "PREROUTING", "-j", "NFQUEUE", "--queue-num", "1")
    for name in ("iptables-legacy", "iptables"):
        if shutil.which(name, path=search_path()) is not None and _works(name, *rule):
            return name
    _require("iptables")
    raise EmulationError(
        "this kernel can neither delay packets by sch_netem nor queue them by NFQUEUE; install the kernel's extra"
        " modules (Debian, Ubuntu: linux-modules-extra-$(uname -r)), or use a topology without latency"
    )


def _works(*argv: str) -> bool:
    """Say whether a command succeeds in a fresh sandbox; raise EmulationError where there can be none."""
    _require(argv[0])
    tried = subprocess.run(run_in_sandbox_argv(argv), capture_output=True, text=True, check=False)
    if tried.stderr.startswith("wantrain: "):
        raise EmulationError(tried.stderr.removeprefix("wantrain: ").strip())
    return tried.returncode == 0


def _require(program: str) -> None:
    if shutil.which(program, path=search_path()) is None:
        package = _PACKAGE.get(program, program)
        raise EmulationError(f"the program '{program}' is missing; install the package {package}")


def run_commands(commands: Iterable[Command]) -> None:
    """Run commands in order; those of one `ip` or `tc` in one namespace go to it in one batch, which is much faster."""
    for program, group in itertools.groupby(commands, key=_batched_by):
        lines = list(group)
        if program is None:
            for command in lines:
                _run(list(command.argv), "", str(command))
        else:
            rest = "".join(shlex.join(command.argv[len(program) :]) + "\n" for command in lines)
            _run([*program, "-batch", "-"], rest, str(lines[0]) if len(lines) == 1 else f"{shlex.join(program)} …")


def _batched_by(command: Command) -> tuple[str, ...] | None:
    """Return the program, with its namespace, that can take this command in a batch."""
    argv = command.argv
    if argv[:1] in (("ip",), ("tc",)) and argv[1:2] == ("-n",):
        return argv[:3]
    return ("ip",) if argv[:2] == ("ip", "link") else None


def _run(argv: list[str], text: str, shown: str) -> None:
    _require(argv[0])
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise EmulationError(
            f"the network can't be built: '{shown}' failed ({said}); see 'wantrain doctor', and 'wantrain emulate"
            " --dry-run' for all commands"
        )


def _await_ready(worker: str, line: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait for a delay line's announcement; what it says instead is the error."""
    assert line.stdout is not None
    assert line.stderr is not None
    if _read_within(line.stdout, deadline).strip() != READY.encode():
        line.kill()
        said = " ".join(line.stderr.read().decode(errors="replace").split()).removeprefix("wantrain: ")
        raise EmulationError(f"the delay line of worker '{worker}' didn't start ({said or 'no answer in time'})")


def _read_within(pipe: IO[bytes], deadline: float) -> bytes:
    ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(pipe.fileno(), 64) if ready else b""
