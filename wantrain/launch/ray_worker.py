"""A worker's process on another node, for the launcher: what `subprocess.Popen` is for one on this host.

An agent (`ray_agent`) holds the process. It is asked what is new several times a second, one question at a time, and
nothing waits for its answer: a node that is gone doesn't answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wantrain.launch.ray_cluster import Node, import_ray
from wantrain.launch.tail import keep_earlier

_SILENT_S = 2.0
"""Chosen: after so long without an answer the node itself is looked for; a busy machine takes longer to answer."""

_LOST_AFTER_S = 60.0
"""Chosen: a node of which nothing is heard for a minute is as good as gone; Ray itself says so sooner, as a rule."""

_SETTLED_WITHIN_S = 5.0
_POLL_S = 0.1


class RemoteWorker:
    """One worker's process, its output in a log here and on standard error, behind the worker's name."""

    def __init__(
        self, name: str, node: Node, agent: Any, argv: Sequence[str], variables: Mapping[str, str], log: Path
    ) -> None:
        """Have the agent start this Python with `argv`."""
        self.why_lost = ""
        """Why nothing can be heard any more; empty while something can."""
        self._name, self._node, self._agent, self._ray = name, node, agent, import_ray()
        self._status: int | None = None
        self._rest = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        keep_earlier(log)
        self._log = log
        log.touch()
        variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        self._start: Any = agent.start.remote(list(argv), variables, node.address, os.getcwd())
        self._ask()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs; a worker that is lost counts as killed."""
        if self._status is None:
            self._hear()
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raise subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
            time.sleep(_POLL_S)
        return status

    def terminate(self) -> None:
        """Ask it to end."""
        self._agent.signal.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        """End it."""
        self._agent.signal.remote(int(signal.SIGKILL))

    def is_lost(self) -> bool:
        """Say whether it is gone by no fault of its own: killed, or with its node. Wait a little for a sign of life."""
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        asked_at = self._asked_at
        while self.poll() is None and self._asked_at == asked_at and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return bool(self.why_lost) or (self._status is not None and self._status < 0)

    def _ask(self) -> None:
        self._asked, self._asked_at = self._agent.hear.remote(), time.monotonic()
        self._looked_at = self._asked_at

    def _hear(self) -> None:
        """Take the answer if it has come, and ask anew; without one look whether the node is still there."""
        ready, _ = self._ray.wait([self._asked], timeout=0)
        if not ready:
            self._look_for_node()
            return
        try:
            if self._start is not None:
                self._ray.get(self._start)  # it was asked before, so it is done; what went wrong is raised
                self._start = None
            said, self._status = self._ray.get(self._asked)
        except self._ray.exceptions.RayError as caught:
            self._lose(f"its actor on node '{self._node.name}' has died ({type(caught).__name__})")
            return
        self._write(said)
        if self._status is None:
            self._ask()
        else:
            self._write(b"\n" if self._rest else b"")

    def _look_for_node(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _SILENT_S:
            return
        self._looked_at = now
        if self._node.is_gone():
            self._lose(f"its node '{self._node.name}' ({self._node.address}) is gone")
        elif now - self._asked_at > _LOST_AFTER_S:
            self._lose(f"nothing was heard from node '{self._node.name}' for {_LOST_AFTER_S:g} s")

    def _lose(self, why: str) -> None:
        self.why_lost, self._status = why, -signal.SIGKILL

    def _write(self, said: bytes) -> None:
        """Put what was said into the log; show whole lines."""
        if not said:
            return
        with self._log.open("ab") as file:
            file.write(said)
        *lines, self._rest = (self._rest + said).split(b"\n")
        for line in lines:
            print(f"{self._name}: {line.decode(errors='replace')}", file=sys.stderr, flush=True)
