"""`wantrain launch CONFIG --hosts FILE`: the workers of a job on machines reached over SSH.

    wantrain launch          reads and checks everything, plans, and for each worker
      └─ ssh HOST … agent    (agent.py) holds its host's environment, interface and ports against what is asked, and
           └─ torchrun … -m wantrain train … --worker NAME

The launcher's run directory mirrors what the workers write: metrics, timelines, notes, logs. So progress and report are
those of a job on one machine. Checkpoints stay on the hosts' disks. Whatever ends the launcher ends the job on every
host: each agent lives by its connection. `--resume` goes on from the newest checkpoint that all hosts have.
"""

from __future__ import annotations

import argparse
import queue
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wantrain.config import RunConfig
from wantrain.errors import ConfigError, DataError
from wantrain.fact import write_text
from wantrain.launch.connection import Connection
from wantrain.launch.environment import Environment
from wantrain.launch.hosts import Host, Hosts
from wantrain.launch.tail import keep_earlier
from wantrain.launch.torchrun import train_argv, worker_argv
from wantrain.launch.watch import END_WITHIN_S, end, follow, sum_up, write_figures, write_page
from wantrain.plan import Plan
from wantrain.report.tables import print_plan, print_summary
from wantrain.run_directory import RunDirectory
from wantrain.topology import Topology
from wantrain.training.job import load_config, new_run_directory, resolve, write_run_directory

_CLOCKS_WITHIN_S = 1.0
"""Chosen: rates and timelines are told by the hosts' clocks, and steps of these jobs take about a second."""


class RemoteWorker:
    """A worker on another host: its agent's connection, and the mirror of what it writes. Like a Popen to launchers."""

    def __init__(self, name: str, host: Host, run: RunDirectory, say: Callable[[str], None]) -> None:
        self.name, self.host = name, host
        self._run, self._say = run, say
        self._status: int | None = None
        self._mirrored: set[str] = set()
        keep_earlier(run.logs / f"{name}.log")
        self._connection = Connection(host, self._mirror)

    def ask(self, do: str, **values: Any) -> None:
        """Send a command."""
        self._connection.send(do, **values)

    def answer(self, kind: str) -> dict[str, Any]:
        """Wait for a command's answer; see Connection."""
        return self._connection.answer(kind)

    def poll(self) -> int | None:
        """Return torchrun's exit status, None while it runs; 1 where the host is gone."""
        if self._status is None and self._connection.has_ended:
            return 1
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the agent's end; raise subprocess.TimeoutExpired."""
        if not self._connection.wait(timeout):
            raise subprocess.TimeoutExpired("ssh", timeout or 0.0)
        return self.poll() or 0

    def terminate(self) -> None:
        """Ask torchrun to end."""
        self.ask("end")

    def kill(self) -> None:
        """Have all of it killed there."""
        self._connection.close()

    @property
    def why_lost(self) -> str:
        """Why nothing is heard of it any more; empty where its torchrun's end was heard."""
        if self._status is not None or not self._connection.has_ended:
            return ""
        return self._connection.why_gone()

    def _mirror(self, said: dict[str, Any]) -> bool:
        """Write what the worker wrote into the launcher's run directory; in the connection's thread."""
        kind = said["is"]
        if kind == "lines":
            self._mirror_lines(said["file"], said["text"], said["restarted"])
        elif kind == "file":
            write_text(self._run.path / said["file"], said["text"])
        elif kind == "ended":
            self._status = said["status"]
        return kind in ("lines", "file", "ended")

    def _mirror_lines(self, name: str, text: str, restarted: bool) -> None:
        path = self._run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = restarted or name not in self._mirrored  # a launch gets each file from its beginning
        self._mirrored.add(name)
        with path.open("w" if is_new else "a", encoding="utf-8") as file:
            file.write(text)
        if name.startswith("logs/"):
            for line in text.splitlines():
                self._say(f"{self.name}: {line}")


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain launch --hosts`."""
    if args.no_emulation or args.dilation != 1:
        raise ConfigError("--hosts takes the network as it is; leave out --no-emulation and --dilation")
    hosts = Hosts.load(args.hosts)
    config = load_config(args.config, args.data, args.topology, args.set)
    job = resolve(config, args.plan)
    hosts.require(job.plan.workers, args.insecure)
    run = new_run_directory(config, args.run_dir, args.resume)
    write_run_directory(run, job)
    return _Launch(run, job.plan, config, job.topology, hosts, args).run()


class _Launch:
    """One launch: what was asked for, and the workers once they are there."""

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        config: RunConfig,
        topology: Topology,
        hosts: Hosts,
        args: argparse.Namespace,
    ) -> None:
        self._run, self._plan, self._config, self._topology = run, plan, config, topology
        self._hosts, self._args = hosts, args
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._token = uuid.uuid4().hex

    def run(self) -> int:
        """Start, watch, report; return the exit status."""
        run, plan, config = self._run, self._plan, self._config
        print_plan(plan, self._topology)
        write_text(run.path / "launcher", self._token)
        with self._connected() as workers:
            self._check(workers)
            first_step = self._prepare(workers)
            self._start(workers)
            interrupted = follow(
                run,
                plan,
                config,
                workers,
                ask_to_stop=lambda: workers[plan.workers[0]].ask("stop"),
                why_lost=lambda name: workers[name].why_lost,
                said=self._said,
                first_step=first_step,
            )
        self._sum_up()
        write_page(run)
        print_summary(run, interrupted, hosts=self._args.hosts)
        return 130 if interrupted else 0

    @contextmanager
    def _connected(self) -> Iterator[dict[str, RemoteWorker]]:
        """Connect to every worker's host; on the way out end what still runs there, gently first."""
        workers: dict[str, RemoteWorker] = {}
        try:
            for name in self._plan.workers:
                workers[name] = RemoteWorker(name, self._hosts.host_of(name), self._run, self._lines.put)
            yield workers
            end(workers.values(), END_WITHIN_S)
        except BaseException:
            for worker in workers.values():
                worker.terminate()
            raise
        finally:
            for worker in workers.values():
                worker.kill()

    def _said(self) -> Iterator[str]:
        while not self._lines.empty():
            yield self._lines.get()

    def _check(self, workers: Mapping[str, RemoteWorker]) -> None:
        """Hold every host against this one and the hosts file, and every pair against each other."""
        here = Environment.here()
        for worker in workers.values():
            worker.ask("hello")
        for worker in workers.values():
            said = worker.answer("hello")
            del said["is"]
            here.require_same(Environment.model_validate(said), worker.host.name)
        for worker in workers.values():
            _note_clock(worker)
        first, ports = self._plan.workers[0], self._hosts.ports
        for name, worker in workers.items():
            worker.ask(
                "network",
                address=worker.host.address,
                interface=worker.host.interface,
                tunnel=self._hosts.wireguard is not None and not self._args.insecure,
                port=self._hosts.port if name == first else None,
                ports=None if ports is None else str(ports),
            )
        for worker in workers.values():
            worker.answer("network")
        _require_reach(workers, self._hosts.port, first)

    def _prepare(self, workers: Mapping[str, RemoteWorker]) -> int:
        """Send every host its files; return the step from which all can go on."""
        names = ("config.json", "plan.json", "topology.toml")
        files = {name: (self._run.path / name).read_text(encoding="utf-8") for name in names}
        for rank, (name, worker) in enumerate(workers.items()):
            worker.ask(
                "prepare",
                folder=worker.host.folder,
                run=self._run.path.absolute().name,
                token=self._token,
                files=files,
                rank=rank,
                worker=name,
                resume=self._args.resume,
                data=self._data_of(worker.host),
            )
        prepared = [worker.answer("prepared") for worker in workers.values()]
        self._directories = {name: said["run_directory"] for name, said in zip(workers, prepared, strict=True)}
        common = set.intersection(*(set(said["steps"]) for said in prepared))
        return max(common, default=0) if self._args.resume else 0

    def _data_of(self, host: Host) -> str:
        """Return where a host's text is; empty for what every machine has."""
        given = host.data or self._config.data.source
        return "" if given == "stdlib" else given

    def _start(self, workers: Mapping[str, RemoteWorker]) -> None:
        master = self._hosts.host_of(self._plan.workers[0]).address
        for name, worker in workers.items():
            directory = RunDirectory(self._directories[name])
            options = ["--run-dir", str(directory.path), "--plan", str(directory.plan)]
            options += ["--topology", str(directory.topology)] + (["--resume"] if self._args.resume else [])
            options += ["--data", worker.host.data] if worker.host.data else []
            argv = worker_argv(self._plan, name, master, self._hosts.port, train_argv(str(directory.config), *options))
            worker.ask("start", argv=argv[1:], worker=name)

    def _sum_up(self) -> None:
        """Write the figures; the trigram model's loss only where this machine has the text."""
        try:
            sum_up(self._run, self._config, self._plan)
        except DataError as caught:
            print(f"no trigram loss in the report: {caught}", file=sys.stderr)
            write_figures(self._run, self._config, self._plan, 1.0)


def _note_clock(worker: RemoteWorker) -> None:
    """Say where a host's clock is off: timelines and rates of several hosts are laid on one clock."""
    asked = time.time()
    worker.ask("clock")
    then, answered = worker.answer("clock")["now"], time.time()
    ahead_s, unsure_s = then - (asked + answered) / 2, (answered - asked) / 2
    if abs(ahead_s) > _CLOCKS_WITHIN_S + unsure_s:
        print(f"wantrain: the clock of host '{worker.host.name}' is {ahead_s:+.0f} s off this one's", file=sys.stderr)


def _require_reach(workers: Mapping[str, RemoteWorker], port: int, first: str) -> None:
    """Raise ConfigError where a host can't connect to another: to its listening ports, and to where they meet."""
    for name, worker in workers.items():
        worker.ask("listen", address=worker.host.address, ports=[port, 0] if name == first else [0])
    listening = {name: worker.answer("listening")["ports"] for name, worker in workers.items()}
    for name, worker in workers.items():
        others = [other for other in workers if workers[other].host != worker.host]
        worker.ask(
            "reach",
            places=[(other, workers[other].host.address, one) for other in others for one in listening[other]],
        )
        # one at a time: a host that nobody reaches is then said by the first who tries
        for other, why in worker.answer("reached")["failed"]:
            raise ConfigError(
                f"host '{name}' can't reach host '{other}' ({why}); open its firewall, or join them by [wireguard]"
            )
