"""A Ray cluster of several nodes on this machine, any of which can be killed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WORKERS = ("a-0", "a-1", "b-0", "b-1")

SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_log_monitor": False}


PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def ports() -> dict[str, int]:
    """Choose the ports of a node's agents. Where they choose for themselves a node waits for them to start, and gives
    up after 30 s."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(PORTS, sockets, strict=True)}


class Nodes:
    """A Ray cluster on this machine, a node for each worker; the first is the cluster's head."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"node_name": WORKERS[0], "include_dashboard": False, "no_monitor": True}
        self._cluster = Cluster(initialize_head=True, head_node_args={**SMALL, **ports(), **head})
        self.address: str = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self, name: str, **resources: float) -> None:
        """Start a node that is called so."""
        self._nodes[name] = self._cluster.add_node(wait=False, node_name=name, resources=resources, **SMALL, **ports())

    def kill(self, name: str) -> None:
        """Kill a node as a power cut would: the raylet and all that it started, at once."""
        node = self._nodes.pop(name)
        (raylet,) = (started.process.pid for started in node.all_processes["raylet"])
        for pid in [raylet, *descendants(raylet)]:
            os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        self._cluster.shutdown()


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent and command line of every process of this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(entry.name), parent, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, parent, _ in processes():
        children.setdefault(parent, []).append(child)
    found, left = [], [pid]
    while left:
        found += children.get(left[-1], [])
        left += children.get(left.pop(), [])
    return found
