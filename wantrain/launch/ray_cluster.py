"""A Ray cluster as the launcher sees it: nodes, which of them is which worker of a plan, and an agent on each.

A node is the worker whose name it has as a custom resource (`ray start --resources '{"paris-0": 1}'`), else the one
that it is called after (`--node-name paris-0`), else the one whose address in the topology it has. All agents of a plan
are one placement group: it comes whole or not at all, and what it holds is the job's until its end.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from wantrain.errors import ConfigError, RunError
from wantrain.launch.ray_agent import Agent
from wantrain.topology import Worker

_REACHED_WITHIN_S = 2.0
"""Chosen: many round trips on the longest of lines."""

_ROOM_WITHIN_S = 60.0
"""Chosen: what an ended job held is free again within seconds; a program of somebody else's is not waited for."""

_ANSWER_WITHIN_S = 120.0
"""Chosen: a fresh process imports wantrain and torch's version before it answers."""

_POLL_S = 0.5


class Node(NamedTuple):
    """A live node: Ray's id and name for it, where its raylet listens, and what it offers."""

    id: str
    name: str
    address: str
    port: int
    resources: dict[str, float]

    def is_reachable(self) -> bool:
        """Say whether its raylet takes connections: Ray itself learns only after some ten seconds that it is gone."""
        try:
            self._connect()
        except OSError:
            return False
        return True

    def is_gone(self) -> bool:
        """Say whether its host answers that no raylet is there; a host that is silent may only be busy."""
        try:
            self._connect()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def _connect(self) -> None:
        socket.create_connection((self.address, self.port), _REACHED_WITHIN_S).close()


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Be a program of the cluster at `address` (default: RAY_ADDRESS, else the one that runs on this host)."""
    ray = import_ray()
    if address is not None and "://" in address:
        raise ConfigError(f"--address is HOST:PORT of a cluster that this host is part of (got '{address}')")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else every actor without a GPU warns
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="critical")
    except (ConnectionError, ValueError, RuntimeError) as caught:
        where = f"at {address}" if address else "here"
        said = str(caught).splitlines()[0]
        raise ConfigError(f"no Ray cluster {where} ({said}); 'ray start' joins this host to one") from None
    try:
        yield
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Return Ray; raise ConfigError where it isn't installed."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray; pip install 'wantrain[ray]'") from None
    return ray


def live_nodes() -> list[Node]:
    """Return the nodes that are there."""
    found = [
        Node(
            one["NodeID"], one["NodeName"], one["NodeManagerAddress"], one["NodeManagerPort"], one.get("Resources", {})
        )
        for one in import_ray().nodes()
        if one["Alive"]
    ]
    return [node for node in found if node.is_reachable()]


def find_places(workers: Iterable[Worker], nodes: Sequence[Node]) -> dict[str, Node]:
    """Return the node of each worker that has one."""
    found = {worker.name: _node_of(worker, nodes) for worker in workers}
    return {name: node for name, node in found.items() if node is not None}


def _node_of(worker: Worker, nodes: Sequence[Node]) -> Node | None:
    ways: tuple[Callable[[Node], bool], ...] = (
        lambda node: worker.name in node.resources,
        lambda node: node.name == worker.name,
        lambda node: worker.address is not None and node.address == worker.address,
    )
    return next((node for is_its in ways for node in nodes if is_its(node)), None)


def await_places(
    workers: Sequence[Worker], within_s: float, waiting: Callable[[list[str]], None]
) -> tuple[dict[str, Node], list[str]]:
    """Wait for a node of each worker; return those that came in time, and the names of the workers without.

    `waiting` is called with these all the while.
    """
    deadline = time.monotonic() + within_s
    while True:
        places = find_places(workers, live_nodes())
        missing = [worker.name for worker in workers if worker.name not in places]
        if not missing or time.monotonic() >= deadline:
            return places, missing
        waiting(missing)
        time.sleep(_POLL_S)


@contextmanager
def agents_on(places: Mapping[str, Node], devices: Mapping[str, str], num_cpus: int) -> Iterator[dict[str, Any]]:
    """Give an actor for each worker on its node; at the end no process of theirs is left."""
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {name: _needs(name, node, devices[name], num_cpus) for name, node in places.items()}
    group = placement_group(
        list(needs.values()),
        strategy="PACK",  # where each goes is said below, bundle by bundle
        bundle_label_selector=[{"ray.io/node-id": node.id} for node in places.values()],
    )
    agents: dict[str, Any] = {}
    try:
        if not group.wait(_ROOM_WITHIN_S):
            raise RunError(f"the cluster has no room: {_describe(needs, places)}; end what else runs there")
        actor = import_ray().remote(Agent)
        for i, (name, need) in enumerate(needs.items()):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
            agents[name] = actor.options(
                num_cpus=num_cpus, num_gpus=need.get("GPU", 0), max_restarts=0, scheduling_strategy=place
            ).remote()
        yield agents
    finally:
        for agent in agents.values():
            import_ray().kill(agent)
        remove_placement_group(group)


def _needs(worker: str, node: Node, device: str, num_cpus: int) -> dict[str, float]:
    """Return what a worker takes of its node: processors, a GPU, and the resource that has its name."""
    needs: dict[str, float] = {"CPU": num_cpus}
    if device.startswith("cuda"):
        needs["GPU"] = 1
    if worker in node.resources:
        needs[worker] = min(1.0, node.resources[worker])
    return needs


def _describe(needs: Mapping[str, Mapping[str, float]], places: Mapping[str, Node]) -> str:
    return ", ".join(
        f"'{name}' needs {' and '.join(f'{count:g} {what}' for what, count in need.items())} of {places[name].name}"
        for name, need in needs.items()
    )


def ask_all(agents: Mapping[str, Any], ask: Callable[[Any], Any]) -> dict[str, Any]:
    """Ask every agent the same, all at once; return the answers. Raise RunError for one that is gone or silent."""
    ray = import_ray()
    asked = {name: ask(agent) for name, agent in agents.items()}
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=_ANSWER_WITHIN_S)
        except ray.exceptions.RayError as caught:
            said = [line for line in str(caught).splitlines() if line.strip()][-1].strip()
            raise RunError(f"can't start worker '{name}' ({said}); is wantrain installed on its node?") from None
    return answers
