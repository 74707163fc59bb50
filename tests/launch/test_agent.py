"""The far end of a launch over SSH, without SSH: a process of its own, spoken to by pipes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wantrain.errors import ConfigError
from wantrain.launch import agent
from wantrain.launch.interfaces import Interface

FILES = {"config.json": "{}\n", "plan.json": "{}\n", "topology.toml": ""}


class Spoken:
    """An agent's process."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "wantrain.launch.agent"]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.send(do, **values)
        return self.hear()

    def send(self, do: str, **values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def prepare(self, folder: Path, **changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"folder": str(folder), "run": "run", "token": "t", "files": FILES, "rank": 0}
        return self.ask("prepare", **(given | {"worker": "w", "resume": False, "data": ""} | changes))


@pytest.fixture
def spoken() -> Iterator[Spoken]:
    one = Spoken()
    yield one
    one.process.kill()
    one.process.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_files_arrive_and_what_is_written_comes_back(spoken: Spoken, tmp_path: Path) -> None:
    said = spoken.prepare(tmp_path)
    assert said == {"is": "prepared", "run_directory": str(tmp_path / "run"), "steps": []}
    assert (tmp_path / "run" / "config.json").read_text() == FILES["config.json"]
    (tmp_path / "run" / "metrics").mkdir()
    metrics = tmp_path / "run" / "metrics" / "rank-0.jsonl"
    metrics.write_text('{"step": 0}\n{"ste')
    assert spoken.hear() == {"is": "lines", "file": "metrics/rank-0.jsonl", "text": '{"step": 0}\n', "restarted": False}
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert spoken.hear() == {"is": "file", "file": "summary.json", "text": "{}"}
    spoken.send("stop")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("files", "changes", "said"),
    [
        ({"metrics/rank-0.jsonl": ""}, {}, "holds a run; go on with --resume"),
        ({"launcher": "t"}, {}, "is the launcher's own run directory"),
        ({}, {"data": "/nowhere"}, "the training text isn't there"),
    ],
)
def test_what_cannot_be_is_refused(
    spoken: Spoken, tmp_path: Path, files: dict[str, str], changes: dict[str, Any], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    refused = spoken.prepare(tmp_path, **changes)
    assert (refused["is"], refused["status"]) == ("refused", 2)
    assert said in refused["why"]
    assert spoken.process.wait(60) == 0


def test_an_address_must_be_this_hosts_and_with_tunnels_a_tunnels(
    spoken: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"address": "192.0.2.1", "interface": "", "tunnel": True, "port": None, "ports": None}
    assert "address 192.0.2.1 is none of this host's" in spoken.ask("network", **asked)["why"]
    said: list[dict[str, Any]] = []
    one = agent.Agent(lambda what, **values: said.append({"is": what, **values}))
    monkeypatch.setattr(agent, "interface_with", lambda _: Interface("eth0", "", 1500))
    with pytest.raises(ConfigError, match=r"interface eth0 with 192.0.2.1 is no WireGuard tunnel; bring one up"):
        one.carry_out({"do": "network", **asked})
    one.carry_out({"do": "network", **asked, "tunnel": False})
    monkeypatch.setattr(agent, "interface_with", lambda _: Interface("wantrain", "tun", 1420))
    one.carry_out({"do": "network", **asked})
    assert [(answer["interface"], answer["mtu"]) for answer in said] == [("eth0", 1500), ("wantrain", 1420)]


def test_a_resumed_run_tells_its_checkpoints_and_keeps_the_earlier_log(spoken: Spoken, tmp_path: Path) -> None:
    for name in ("step-00000005", "step-00000010", "writing-15"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "w.log").write_text("earlier\n")
    assert spoken.prepare(tmp_path, resume=True)["steps"] == [10, 5]
    assert [path.read_text() for path in (tmp_path / "run" / "logs").iterdir()] == ["earlier\n"]


@pytest.mark.parametrize("how", ["end of input", "killed"])
def test_nothing_outlives_it(spoken: Spoken, tmp_path: Path, how: str) -> None:
    """The worker is a script that has a process of its own in another session."""
    spoken.prepare(tmp_path)
    script = (
        "import subprocess, time, sys\n"
        "from wantrain.netem.sandbox import die_with_parent\n"
        "die_with_parent()  # as a worker does\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True, preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    (tmp_path / "job.py").write_text(script)
    spoken.send("start", argv=["--nproc-per-node", "1", "--standalone", str(tmp_path / "job.py")], worker="w")
    text = ""
    while not text:
        spoken.send("alive")
        if not select.select([spoken.process.stdout], [], [], 5)[0]:
            continue
        said = spoken.hear()
        text = next((line for line in said.get("text", "").splitlines() if line.isdecimal()), "")
    grandchild = int(text)
    assert alive(grandchild)
    assert spoken.process.stdin is not None
    spoken.process.stdin.close() if how == "end of input" else os.kill(spoken.process.pid, signal.SIGKILL)
    spoken.process.wait(60)
    deadline = time.monotonic() + (0 if how == "end of input" else 60)
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(grandchild)
    with contextlib.suppress(BrokenPipeError):  # what it was last told, it never read
        spoken.process.stdin.close()
    spoken.process.stdin = None


def test_a_silent_launcher_is_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SILENT_FOR_S", 0.5)
    monkeypatch.setattr(agent, "kill_descendants", lambda: None)  # the tests' own process has others
    began_s = time.monotonic()
    assert agent.serve(queue.Queue(), lambda *_, **__: None) == 0
    assert 0.4 < time.monotonic() - began_s < 30
