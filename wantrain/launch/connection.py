"""The launcher's end of an agent (`agent.py`): ssh, a line of JSON each way, and a word every few seconds.

ssh is the system's own, with the user's configuration, keys and known hosts. It never asks (BatchMode): a host whose
key isn't known, or that wants a password, is refused in one line, as ssh says it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from wantrain.errors import ConfigError, RunError, UserError
from wantrain.launch.hosts import Host
from wantrain.netem.sandbox import die_with_parent

_WORD_EVERY_S = 5.0
_ANSWER_WITHIN_S = 120.0
"""Chosen: a cold Python on a slow disk, and a data set's token file, take a while."""

_END_WITHIN_S = 10.0
_SSH_FAILED = 255
_SSH_WORDS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
"""A host that is gone without a word is noticed after fifteen seconds."""


def ssh_argv(host: Host) -> list[str]:
    """Return the line that starts an agent on a host."""
    agent = shlex.join([host.python, "-m", "wantrain.launch.agent"])
    return ["ssh", *_SSH_WORDS, *host.ssh_options, "--", host.ssh, f"exec {agent}"]


class Connection:
    """An agent on a host, from its start to `close`; used from one thread.

    `unasked` takes, in a thread of the connection's own, what the agent says without being asked; it returns whether it
    knew the message.
    """

    def __init__(self, host: Host, unasked: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        self.host = host
        self._unasked = unasked
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._complaints: list[str] = []
        self._closing = threading.Event()
        self._sending = threading.Lock()
        try:
            self._ssh = subprocess.Popen(
                ssh_argv(host),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C reaches only the launcher
                preexec_fn=die_with_parent,
            )
        except FileNotFoundError:
            raise ConfigError("the program ssh is missing; sudo apt-get install openssh-client") from None
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._listen, self._listen_to_ssh, self._keep_alive)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, do: str, **values: Any) -> None:
        """Send a command; an agent that is gone says so when it's asked for an answer."""
        line = json.dumps({"do": do, **values}).encode() + b"\n"
        assert self._ssh.stdin is not None
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._ssh.stdin.write(line)
            self._ssh.stdin.flush()

    def answer(self, kind: str) -> dict[str, Any]:
        """Wait for the answer to a command.

        Raise ConfigError where the agent refuses or can't be started, RunError where it is gone.
        """
        try:
            said = self._answers.get(timeout=_ANSWER_WITHIN_S)
        except queue.Empty:
            raise RunError(
                f"host '{self.host.name}' doesn't answer within {_ANSWER_WITHIN_S:g} s; is it well?"
            ) from None
        if said is None:
            raise ConfigError(f"can't start on host '{self.host.name}': {self.why_gone()}")
        if said["is"] == "refused":
            kind_of_error = ConfigError if said["status"] == UserError.exit_status else RunError
            raise kind_of_error(f"host '{self.host.name}': {said['why']}")
        assert said["is"] == kind, said
        return said

    def why_gone(self) -> str:
        """Say why the connection ended, in ssh's or the agent's own words."""
        self._threads[1].join(_END_WITHIN_S)
        status = self._ssh.poll()
        last = self._complaints[-1] if self._complaints else "it said nothing"
        if status == _SSH_FAILED:
            return (
                f"the ssh connection failed ({last}); try: {shlex.join(['ssh', *self.host.ssh_options, self.host.ssh])}"
            )
        return f"{self.host.python} -m wantrain.launch.agent ended there ({last}); is wantrain installed for it?"

    @property
    def has_ended(self) -> bool:
        """Whether the agent is gone, and all that it said was heard."""
        return not self._threads[0].is_alive()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until the agent is gone; say whether it is."""
        self._threads[0].join(timeout_s)
        return self.has_ended

    def close(self) -> None:
        """Let the agent kill what it started and end; return when it has, or when ssh was killed."""
        self._closing.set()
        assert self._ssh.stdin is not None
        with self._sending, contextlib.suppress(OSError):
            self._ssh.stdin.close()
        try:
            self._ssh.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._ssh.kill()  # the host is out of reach; its agent ends for want of a word
            self._ssh.wait()
        for thread in self._threads:
            thread.join(_END_WITHIN_S)
        for stream in (self._ssh.stdout, self._ssh.stderr):
            assert stream is not None
            stream.close()

    def _listen(self) -> None:
        assert self._ssh.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # a line cut off in the middle, when the host was lost
            for line in self._ssh.stdout:
                said = json.loads(line)
                if not self._unasked(said):
                    self._answers.put(said)
        self._answers.put(None)

    def _listen_to_ssh(self) -> None:
        assert self._ssh.stderr is not None
        for line in self._ssh.stderr:
            if said := line.decode(errors="replace").strip():
                self._complaints.append(said)

    def _keep_alive(self) -> None:
        while not self._closing.wait(_WORD_EVERY_S):
            self.send("alive")
