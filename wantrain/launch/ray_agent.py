"""What runs on a node of a cluster for the launcher: it starts one worker's process, hands on what that prints, and
ends it.

The process never outlives the agent, however that dies (PR_SET_PDEATHSIG), and the agent never outlives the program
that started it: Ray's actors do where their raylet is killed, and such an orphan would train on, into the checkpoints
of the worker that took its place.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from wantrain.netem.sandbox import die_with_parent

_ORPHANED_WITHIN_S = 0.5
"""Chosen: a restart elsewhere takes seconds."""

_SIOCGIFADDR = 0x8915


class HostFacts(NamedTuple):
    """What a launcher asks of a node before it starts anything there."""

    versions: dict[str, str]
    """Of what decides the numbers and the words that workers exchange."""
    sees: bool
    """Whether the node has the launcher's file, of the same content."""


class Agent:
    """One worker's process on this node; every method returns at once."""

    def __init__(self) -> None:
        """Begin to watch the process that started this one."""
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[bytes] = deque()
        self._reader: threading.Thread | None = None
        threading.Thread(target=self._end_when_orphaned, args=(os.getppid(),), daemon=True).start()

    def describe(self, path: str, content: str) -> HostFacts:
        """Say what is installed here, and whether the file at `path` has this content."""
        return HostFacts(versions(), _read(Path(path)) == content)

    def free_port(self) -> int:
        """Return a port that nobody listens on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
            return port

    def start(self, argv: Sequence[str], variables: Mapping[str, str], address: str, folder: str) -> None:
        """Start this Python with `argv`, in `folder` where that exists here.

        Without GLOO_SOCKET_IFNAME in the node's own environment gloo gets the interface that has `address`.
        """
        environment = os.environ | dict(variables)
        interface = interface_of(address)
        if interface is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._process = subprocess.Popen(
            [sys.executable, *argv],
            env=environment,
            cwd=folder if os.path.isdir(folder) else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hear(self) -> tuple[bytes, int | None]:
        """Return what the process has printed since the last call, and its exit status once it has ended."""
        status = None if self._process is None else self._process.poll()
        if status is not None and self._reader is not None:
            self._reader.join()  # what it said last belongs before its end
        said = [self._said.popleft() for _ in range(len(self._said))]
        return b"".join(said), status

    def signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        if self._process is not None:
            self._process.send_signal(number)  # nothing, where its end was noticed

    def read(self, path: str) -> str | None:
        """Return a file of this node; None where there is none."""
        return _read(Path(path))

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while piece := os.read(self._process.stdout.fileno(), 1 << 16):
            self._said.append(piece)

    def _end_when_orphaned(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHANED_WITHIN_S)
        if self._process is not None:
            self._process.kill()
        os.kill(os.getpid(), signal.SIGKILL)


def versions() -> dict[str, str]:
    """Return the versions that all workers of a job must have in common."""
    return {name: version(name) for name in ("wantrain", "torch")}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Return the network interface that has an IPv4 address; None where no interface of this host has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it is down, or has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
