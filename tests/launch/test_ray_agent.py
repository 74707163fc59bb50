"""Agents in processes of their own: they end with whoever started them, and that must not be pytest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from wantrain.launch.ray_agent import interface_of, versions

PATIENCE_S = 120.0

BEGIN = """
import os, subprocess, sys, time
from wantrain.launch.ray_agent import Agent
agent = Agent()
"""

SAY = """
agent.start(["-c", "import os; print(os.environ['RANK'], os.environ['GLOO_SOCKET_IFNAME'], os.getcwd())"],
            {"RANK": "3"}, "127.0.0.1", sys.argv[1])
said, status = b"", None
while status is None:
    more, status = agent.hear()
    said += more
print(said.decode(), status)
"""

SLEEP = """
agent.start(["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"], {}, "127.0.0.1", "/")
said = b""
while not said.endswith(b"\\n"):
    said += agent.hear()[0]
print(os.getpid(), said.decode(), flush=True)
time.sleep(1000)
"""

START_SLEEP = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {BEGIN + SLEEP!r}])
time.sleep(1000)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def test_a_process_gets_its_environment_and_its_words_come_before_its_end(tmp_path: Path) -> None:
    agent = start(BEGIN + SAY, str(tmp_path))
    said, _ = agent.communicate(timeout=PATIENCE_S)
    assert said.split() == ["3", "lo", str(tmp_path), "0"]


def test_the_process_of_a_killed_agent_ends() -> None:
    agent = start(BEGIN + SLEEP)
    assert agent.stdout is not None
    _, process = map(int, agent.stdout.readline().split())
    assert is_running(process)
    agent.kill()
    wait_until_gone(process)
    agent.communicate()


def test_an_agent_whose_starter_was_killed_ends_with_its_process() -> None:
    starter = start(START_SLEEP)
    assert starter.stdout is not None
    agent, process = map(int, starter.stdout.readline().split())
    assert is_running(agent)
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    wait_until_gone(agent, process)
    starter.communicate()


@pytest.mark.parametrize(("address", "interface"), [("127.0.0.1", "lo"), ("203.0.113.9", None)])
def test_an_interface_is_found_by_its_address(address: str, interface: str | None) -> None:
    assert interface_of(address) == interface


def test_versions_are_of_what_decides_the_numbers() -> None:
    assert versions() == {name: version(name) for name in ("wantrain", "torch")}
