"""A topology from a live cluster: the nodes are the workers, and `wantrain profile --links` runs on all of them."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from wantrain.errors import ConfigError, RunError
from wantrain.fact import write_text
from wantrain.launch.ray_cluster import Node, agents_on, ask_all, live_nodes
from wantrain.launch.ray_worker import RemoteWorker
from wantrain.launch.watch import END_WITHIN_S, end

_MEASURED_WITHIN_S = 1800.0
"""Chosen: pairs are measured one after the other, half a minute each on a slow line."""

_POLL_S = 0.25


def measure_topology(out: str) -> str:
    """Measure the links between all nodes that have a processor, write the topology to `out` and return that.

    Raise ConfigError where there is nothing to measure, RunError where it fails.
    """
    places = {node.name: node for node in live_nodes() if node.resources.get("CPU", 0) >= 1}
    if len(places) < 2:
        raise ConfigError(
            f"--measure needs two nodes at least, each of its own name (got {', '.join(places) or 'none'});"
            " 'ray start --node-name NAME' gives one"
        )
    with agents_on(places, dict.fromkeys(places, "cpu"), 1) as agents:
        write_text(out, _measure(places, agents))
    print(f"measured {len(places)} nodes; their topology is in {out}", file=sys.stderr)
    return out


def _measure(places: dict[str, Node], agents: dict[str, Any]) -> str:
    names = list(places)
    (port,) = ask_all({names[0]: agents[names[0]]}, lambda agent: agent.free_port.remote()).values()
    place = {"MASTER_ADDR": places[names[0]].address, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(names))}
    with tempfile.TemporaryDirectory() as logs:
        workers: dict[str, RemoteWorker] = {}
        written = f"{logs}/topology.toml"  # on the first node, which makes the folder if it is another host
        try:
            for rank, (name, node) in enumerate(places.items()):
                argv = ["-m", "wantrain", "profile", "--links", "--worker", name, "--out", written]
                variables = place | {"RANK": str(rank)}
                workers[name] = RemoteWorker(name, node, agents[name], argv, variables, Path(logs, f"{name}.log"))
            _await_end(workers)
            (text,) = ask_all({names[0]: agents[names[0]]}, lambda agent: agent.read.remote(written)).values()
        finally:
            end(workers.values(), END_WITHIN_S)
    if text is None:
        raise RunError(f"node '{names[0]}' measured the links and left no topology; see what it said above")
    return str(text)


def _await_end(workers: dict[str, RemoteWorker]) -> None:
    """Wait until all have ended well; raise RunError for the first that doesn't."""
    deadline = time.monotonic() + _MEASURED_WITHIN_S
    while any(worker.poll() is None for worker in workers.values()):
        _raise_if_failed(workers)
        if time.monotonic() > deadline:
            raise RunError(f"the links were not measured within {_MEASURED_WITHIN_S:g} s; try fewer nodes")
        time.sleep(_POLL_S)
    _raise_if_failed(workers)


def _raise_if_failed(workers: dict[str, RemoteWorker]) -> None:
    failed = next((name for name, worker in workers.items() if worker.poll()), None)
    if failed is not None:
        why = workers[failed].why_lost or "see what it said above"
        raise RunError(f"node '{failed}' could not measure its links ({why})")
