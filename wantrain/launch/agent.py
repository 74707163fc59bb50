"""The far end of `wantrain launch --hosts`: started by ssh on a worker's host, it starts torchrun there and watches it.

    launcher ── ssh ── agent ── torchrun ── wantrain train … --worker tokyo-0
      commands ──stdin──►
      ◄──stdout── what it found, metrics, log lines, how it ended

Both ways go lines of JSON. The agent lives exactly as long as it hears from the launcher: where its standard input ends
(the launcher or the ssh connection is gone, however that happened) or nothing is heard for half a minute, it kills
everything that it started, and ends. It is the reaper of all its descendants (PR_SET_CHILD_SUBREAPER), so none escapes;
and should it be killed itself, torchrun and its worker die with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from wantrain.errors import ConfigError, WantrainError
from wantrain.fact import write_text
from wantrain.launch.environment import Environment
from wantrain.launch.hosts import PortRange
from wantrain.launch.interfaces import Interface, interface_called, interface_with, require_free, require_ports
from wantrain.launch.reach import Answerer, reach
from wantrain.launch.tail import Tail, keep_earlier
from wantrain.netem.sandbox import die_with_parent
from wantrain.run_directory import RunDirectory

SILENT_FOR_S = 30.0
"""Chosen: the launcher sends a word every five seconds; six lost ones are no accident."""

_POLL_S = 0.25
_PR_SET_CHILD_SUBREAPER = 36
_REACH_WITHIN_S = 10.0


class Agent:
    """Carries out the launcher's commands, one after the other; `say` sends an answer."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._run: RunDirectory | None = None
        self._answerers: list[Answerer] = []
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._tails: dict[str, Tail] = {}
        self._interface = ""
        self._summary = ""
        self._is_first = False
        self.is_done = False

    def carry_out(self, command: dict[str, Any]) -> None:
        """Do what the launcher asks; raise WantrainError where that can't be."""
        do = command.pop("do")
        getattr(self, f"_do_{do}")(**command)

    def _do_alive(self) -> None:
        pass

    def _do_hello(self) -> None:
        self._say("hello", **Environment.here().model_dump())

    def _do_clock(self) -> None:
        self._say("clock", now=time.time())

    def _do_network(self, address: str, interface: str, tunnel: bool, port: int | None, ports: str | None) -> None:
        """Find the interface with the address, and whether the ports can be had."""
        found = _interface(address, interface)
        if tunnel and not found.is_tunnel:
            raise ConfigError(
                f"interface {found.name} with {address} is no WireGuard tunnel; bring one up ('wantrain wireguard')"
            )
        if ports is not None:
            require_ports(PortRange.of(ports))
        if port is not None:
            require_free(address, port)
        self._interface = found.name
        self._say("network", interface=found.name, mtu=found.mtu)

    def _do_listen(self, address: str, ports: list[int]) -> None:
        """Answer on these ports (0: one that the kernel gives out) until the job starts."""
        for port in ports:
            try:
                self._answerers.append(Answerer(address, port))
            except OSError as caught:
                reason = os.strerror(caught.errno or 0).lower()
                raise ConfigError(f"can't listen on {address} port {port} ({reason}); free it") from None
        self._say("listening", ports=[one.port for one in self._answerers])

    def _do_reach(self, places: list[tuple[str, str, int]]) -> None:
        """Connect to every (host, address, port) and say which can't be reached, and why."""
        failed = []
        for name, address, port in places:
            try:
                reach(address, port, _REACH_WITHIN_S)
            except OSError as caught:
                failed.append((name, f"{address} port {port}: {(caught.strerror or str(caught)).lower()}"))
        self._say("reached", failed=failed)

    def _do_peer(self) -> None:
        """Say at which address of this host ssh's connection came in."""
        self._say("peer", address=os.environ.get("SSH_CONNECTION", "? ? 127.0.0.1 ?").split()[2])

    def _do_prepare(
        self, folder: str, run: str, token: str, files: dict[str, str], rank: int, worker: str, resume: bool, data: str
    ) -> None:
        """Write the run directory; say where it is and which checkpoints it has."""
        self._run = RunDirectory((Path(folder).expanduser() / run).absolute())
        path = self._run.path
        if (path / "launcher").exists() and (path / "launcher").read_text() == token:
            raise ConfigError(f"{path} is the launcher's own run directory; give this host another folder")
        if self._run.metrics(rank).exists() and not resume:
            raise ConfigError(f"{path} holds a run; go on with --resume, or give another --run-dir")
        if data and not Path(data).exists():
            raise ConfigError(f"the training text isn't there ({data}); copy it, or say where it is by the host's data")
        for name, text in files.items():
            write_text(path / name, text)
        self._run.stop.unlink(missing_ok=True)
        self._run.logs.mkdir(parents=True, exist_ok=True)
        self._is_first = rank == 0
        log = f"logs/{worker}.log"
        keep_earlier(path / log)
        mirrored = [f"metrics/rank-{rank}.jsonl", f"timelines/rank-{rank}.jsonl", log]
        self._tails = {name: Tail(path / name) for name in mirrored + ["notes.txt"] * self._is_first}
        self._say("prepared", run_directory=str(path), steps=self._run.saved_steps())

    def _do_start(self, argv: list[str], worker: str) -> None:
        """Start torchrun with this interpreter."""
        assert self._run is not None
        for one in self._answerers:
            one.close()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": self._interface,
        }
        with (self._run.logs / f"{worker}.log").open("wb") as log:
            self._torchrun = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *argv],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _do_stop(self) -> None:
        """Ask the job to end after the step at hand; only rank 0 looks for the file."""
        if self._run is not None:
            self._run.stop.touch()

    def _do_end(self) -> None:
        """Ask torchrun to end; without one there is nothing to wait for."""
        if self._torchrun is None:
            self.is_done = True
        else:
            self._torchrun.terminate()

    def look(self) -> None:
        """Send on what is new in the run directory; say how torchrun ended, once it has."""
        status = None if self._torchrun is None else self._torchrun.poll()
        for name, tail in self._tails.items():
            added = tail.read_bytes()
            if added or tail.restarted:
                self._say("lines", file=name, text=added.decode(errors="replace"), restarted=tail.restarted)
        if self._is_first and self._run is not None and self._run.summary.exists():
            text = self._run.summary.read_text(encoding="utf-8")
            if text != self._summary:
                self._summary = text
                self._say("file", file="summary.json", text=text)
        if status is not None:
            kill_descendants()  # torchrun was killed: its worker need not have noticed yet
            self._say("ended", status=status)
            self.is_done = True


def _interface(address: str, name: str) -> Interface:
    return interface_called(name) if name else interface_with(address)


def kill_descendants() -> None:
    """Kill every process below this one until none is left; whoever loses its parent becomes a child of this one."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def read_commands(stream: BinaryIO, commands: queue.Queue[dict[str, Any] | None]) -> None:
    """Put each line's command into the queue; None at the end."""
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            commands.put(json.loads(line))
    commands.put(None)


def serve(commands: queue.Queue[dict[str, Any] | None], say: Callable[..., None]) -> int:
    """Carry out commands until the job has ended or nobody is there to give any."""
    agent, heard_s = Agent(say), time.monotonic()
    try:
        while not agent.is_done and time.monotonic() - heard_s < SILENT_FOR_S:
            try:
                command = commands.get(timeout=_POLL_S)
                if command is None:
                    break
                heard_s = time.monotonic()
                agent.carry_out(command)
            except queue.Empty:
                pass
            agent.look()
    except WantrainError as caught:
        say("refused", why=str(caught), status=caught.exit_status)
    except BrokenPipeError:
        pass  # the launcher is gone
    finally:
        kill_descendants()
    return 0


def main() -> NoReturn:
    """Serve one launcher over standard input and output."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # only the connection's end ends it; torchrun starts with the defaults
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers

    def say(what: str, **values: Any) -> None:
        answers.write(json.dumps({"is": what, **values}).encode() + b"\n")
        answers.flush()

    commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=read_commands, args=(sys.stdin.buffer, commands), daemon=True).start()
    os._exit(serve(commands, say))  # a thread still reads


if __name__ == "__main__":
    main()
