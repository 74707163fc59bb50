"""Start a job's workers on a Ray cluster, each on the node that the topology means, and keep it going.

    wantrain launch --engine ray (part of the cluster)
      ├─ actor on node paris-0:  python -m wantrain train … --worker paris-0       one placement group
      └─ actor on node tokyo-0:  python -m wantrain train … --worker tokyo-0

Ray finds the nodes, holds their processors, starts the actors and carries what they say; training is what torchrun
would start, with the same environment, and its traffic goes by wantrain's own connections. Where a node or a process is
lost all others end too, since a step needs every worker, and all start again from the last checkpoint: on a node that
has taken the lost one's place, or, with --replan, under a plan that does without. Checkpoints, metrics and logs are in
the run directory, which therefore lies on a disk that all nodes see.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from wantrain.config import RunConfig
from wantrain.errors import ConfigError, RunError
from wantrain.fact import append_line
from wantrain.launch.local import prepare
from wantrain.launch.ray_agent import versions
from wantrain.launch.ray_cluster import Node, agents_on, ask_all, await_places, find_places, joined, live_nodes
from wantrain.launch.ray_measure import measure_topology
from wantrain.launch.ray_worker import RemoteWorker
from wantrain.launch.torchrun import train_argv
from wantrain.launch.watch import END_WITHIN_S, end, follow, sum_up, write_page
from wantrain.plan import Plan
from wantrain.report.tables import print_plan, print_summary
from wantrain.run_directory import RunDirectory
from wantrain.scheduler.replan import replan
from wantrain.topology import Topology
from wantrain.training.job import Job, plan_choices, profile_of, write_run_directory

DEFAULT_RESTARTS = 3
DEFAULT_NODE_WAIT_S = 20.0
"""Chosen: a machine that is kept ready joins within seconds, and training goes on within a minute."""


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain launch --engine ray`."""
    if args.dilation != 1:
        raise ConfigError("--dilation slows the emulated network; it can't go with --engine ray")
    args.no_emulation = True  # the network is the cluster's own
    with joined(args.address):
        _end_on_signals()
        if args.measure is not None:
            if args.topology is not None:
                raise ConfigError("--measure makes the topology; leave out --topology")
            args.topology = measure_topology(args.measure)
        prepared = prepare(args)
        return _Launch(RunDirectory(prepared.path.resolve()), args).watch()


def _end_on_signals() -> None:
    """From now on, end in good order on SIGINT and SIGTERM; while workers run `follow` counts them instead."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@dataclass
class _Trouble:
    """How a job's workers ended where not all went well: the error, and who was lost by no fault of the job."""

    error: RunError
    lost: list[str]


class _Launch:
    """One launch, from its first start over every restart to its end."""

    def __init__(self, run: RunDirectory, args: argparse.Namespace) -> None:
        self._run, self._args = run, args
        self._config, self._topology = RunConfig.load(run.config), Topology.load(run.topology)
        self._max_restarts = DEFAULT_RESTARTS if args.max_restarts is None else args.max_restarts
        self._wait_s = DEFAULT_NODE_WAIT_S if args.node_wait is None else args.node_wait
        self._is_stopping = False

    def watch(self) -> int:
        """Start the workers, again where some are lost, show how it goes, and report."""
        is_resumed, num_restarts = self._args.resume, 0
        print_plan(Plan.load(self._run.plan), self._topology)
        while isinstance(ended := self._attempt(is_resumed), _Trouble):
            if self._is_stopping or not ended.lost or num_restarts >= self._max_restarts:
                raise ended.error
            num_restarts, is_resumed = num_restarts + 1, True
            names = ", ".join(f"'{name}'" for name in ended.lost)
            said = f"lost worker {names}; restart {num_restarts} of {self._max_restarts} from {self._checkpoint()}"
            self._announce(said)
        plan = Plan.load(self._run.plan)
        sum_up(self._run, self._config, plan)
        write_page(self._run)
        print_summary(self._run, ended)
        if ended:
            print("that is, on this cluster: with --engine ray and its options")
        return 130 if ended else 0

    def _attempt(self, is_resumed: bool) -> bool | _Trouble:
        """Run the workers to their end; return whether the user interrupted, or what went wrong."""
        places = self._places()
        plan = Plan.load(self._run.plan)
        with self._started(plan, places, is_resumed) as workers:
            try:
                interrupted = follow(
                    self._run,
                    plan,
                    self._config,
                    workers,
                    ask_to_stop=self._ask_to_stop,
                    check=self._repeat_stop,
                    why_lost=lambda name: workers[name].why_lost,
                    said=tuple,  # the first worker prints the notes too
                    first_step=self._newest() if is_resumed else 0,
                )
            except RunError as caught:
                lost = [name for name, worker in workers.items() if worker.is_lost()]
                end(workers.values(), 0.0)  # those that are left wait for peers that don't come
                return _Trouble(caught, lost)
            finally:
                _end_on_signals()
        return interrupted

    def _ask_to_stop(self) -> None:
        self._is_stopping = True
        self._run.stop.touch()

    def _repeat_stop(self) -> None:
        """Ask again where a worker that was still starting has removed the request, as an earlier run's."""
        if self._is_stopping and not self._run.stop.exists():
            self._run.stop.touch()

    def _newest(self) -> int:
        steps = self._run.saved_steps()
        return steps[0] if steps else 0

    def _checkpoint(self) -> str:
        newest = self._newest()
        return f"the checkpoint of step {newest}" if newest else "the beginning, as there is no checkpoint yet"

    def _announce(self, text: str) -> None:
        append_line(self._run.notes, text)
        print(text, file=sys.stderr, flush=True)

    def _places(self) -> dict[str, Node]:
        """Return the node of each worker of the plan, once all are there; without some, under another plan."""
        plan = Plan.load(self._run.plan)
        told: list[list[str]] = []

        def tell(missing: list[str]) -> None:
            if missing not in told:
                told.append(missing)
                print(f"waiting for a node of {', '.join(missing)}", file=sys.stderr, flush=True)

        wanted = [self._topology.worker(name) for name in plan.workers]
        places, missing = await_places(wanted, self._wait_s, tell)
        if not missing:
            return places
        if not self._args.replan:
            raise RunError(
                f"no live node is worker {', '.join(missing)}; start one with 'ray start --node-name {missing[0]}', or"
                " let the others go on with --replan"
            )
        return self._do_without(plan, missing)

    def _do_without(self, old: Plan, missing: list[str]) -> dict[str, Node]:
        """Plan anew for the workers that have a node, put the plan in the run directory, and return their nodes."""
        places = find_places(self._topology.workers, live_nodes())
        there = tuple(worker for worker in self._topology.workers if worker.name in places)
        if not there:
            raise RunError(f"no live node is a worker of topology '{self._topology.name}'; see 'ray status'")
        sites = tuple(site for site in self._topology.sites if site.name in {worker.site for worker in there})
        topology = self._topology.model_copy(update={"workers": there, "sites": sites})
        free = dict.fromkeys(("num_stages", "num_replicas", "max_in_flight"))
        found = replan(old, topology, profile_of(self._config), **(plan_choices(self._config, topology) | free))
        self._run.plan.rename(self._run.path / f"plan-until-step-{self._newest():08d}.json")
        write_run_directory(self._run, Job(self._config, self._topology, found.plan))
        self._announce(f"planned without {', '.join(missing)}: {found.summary}")
        print_plan(found.plan, topology)
        return {name: places[name] for name in found.plan.workers}

    @contextmanager
    def _started(self, plan: Plan, places: Mapping[str, Node], is_resumed: bool) -> Iterator[dict[str, RemoteWorker]]:
        """Start every worker; on the way out end what still runs, gently first."""
        devices = {name: self._topology.worker(name).device for name in places}
        with agents_on(places, devices, self._config.training.threads) as agents:
            self._check_nodes(agents, places)
            workers: dict[str, RemoteWorker] = {}
            try:
                for name, variables in rendezvous(plan, places, agents).items():
                    argv = self._argv(name, is_resumed)
                    log = self._run.logs / f"{name}.log"
                    workers[name] = RemoteWorker(name, places[name], agents[name], argv, variables, log)
                yield workers
                end(workers.values(), END_WITHIN_S)
            except BaseException:
                end(workers.values(), 0.0)
                raise

    def _argv(self, worker: str, is_resumed: bool) -> list[str]:
        run = self._run
        options = ["--run-dir", str(run.path), "--plan", str(run.plan), "--topology", str(run.topology)]
        return [*train_argv(str(run.config), *options, *(["--resume"] if is_resumed else [])), "--worker", worker]

    def _check_nodes(self, agents: Mapping[str, Any], places: Mapping[str, Node]) -> None:
        """Raise ConfigError for a node with other versions than this host's, or that doesn't see the run directory."""
        own, content = versions(), self._run.plan.read_text(encoding="utf-8")
        found = ask_all(agents, lambda agent: agent.describe.remote(str(self._run.plan), content))
        for name, (theirs, sees) in found.items():
            for package, version in own.items():
                if theirs[package] != version:
                    raise ConfigError(
                        f"the node of worker '{name}' has {package} {theirs[package]} (this host has {version});"
                        " install the same everywhere"
                    )
            if not sees:
                raise ConfigError(
                    f"the node of worker '{name}' ({places[name].address}) doesn't see {self._run.path}; put the run"
                    " directory on a disk that all nodes share, with --run-dir"
                )


def rendezvous(plan: Plan, places: Mapping[str, Node], agents: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return each worker's environment: torchrun's variables as the plan and the nodes have them."""
    first = plan.workers[0]
    (port,) = ask_all({first: agents[first]}, lambda agent: agent.free_port.remote()).values()
    hosts = [places[name].address for name in plan.workers]
    return {
        name: {
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(plan.world_size),
            "LOCAL_RANK": str(hosts[:rank].count(hosts[rank])),
            "LOCAL_WORLD_SIZE": str(hosts.count(hosts[rank])),
            "WANTRAIN_WORKER": name,
        }
        for rank, name in enumerate(plan.workers)
    }
