"""`wantrain emulate` as a user meets it: what workers are told, how runs end, and what is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wantrain.netem.check import LinkCheck, NetworkCheck, UplinkCheck
from wantrain.netem.program import check_lines

Wantrain = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[[str, str], "subprocess.Popen[str]"]
LeftAfter = Callable[[str, float], list[str]]

TWO = """
[[worker]]
name = "w"
count = 2
site = "s"
[[link]]
within = "s"
bandwidth = "50 Mbit/s"
latency = "2 ms"
"""


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.toml"
    path.write_text(TWO)
    return str(path)


@pytest.fixture
def started(two: str, sandbox_works: None) -> Iterator[Start]:
    """Start `wantrain emulate` with a mark in its environment."""
    processes = []

    def start(mark: str, script: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "wantrain", "emulate", two, "--", "sh", "-c", script]
        processes.append(subprocess.Popen(argv, env=os.environ | {"MARK": mark}, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_every_worker_knows_who_it_is_and_where_the_others_are(wantrain: Wantrain, two: str) -> None:
    script = "echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $GLOO_SOCKET_IFNAME $WANTRAIN_WORKER"
    done = wantrain("emulate", two, "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        "w-0 | 0 2 0 10.77.0.1:29500 e0 w-0",
        "w-1 | 1 2 0 10.77.0.1:29500 e0 w-1",
    ]


def test_only_one_worker_has_the_terminal_to_itself(wantrain: Wantrain, two: str) -> None:
    done = wantrain("emulate", two, "--only", "w-1", "--", "sh", "-c", "echo $RANK")
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_the_first_failure_is_the_exit_status_and_ends_the_others(wantrain: Wantrain, two: str) -> None:
    began = time.monotonic()
    done = wantrain("emulate", two, "--", "sh", "-c", "[ $RANK = 1 ] && exit 9; sleep 60")
    assert done.returncode == 9
    assert time.monotonic() - began < 20


@pytest.mark.measured
def test_check_prints_asked_beside_measured_and_the_dilation(wantrain: Wantrain, two: str) -> None:
    done = wantrain("emulate", two, "--check", "--dilation", "2")
    assert done.returncode == 0, done.stderr
    assert "dilation 2" in done.stdout
    assert done.stdout.count("47.8 Mbit/s") >= 2


def test_dry_run_prints_the_commands_and_runs_none(wantrain: Wantrain, two: str) -> None:
    done = wantrain("emulate", two, "--dry-run")
    assert "tc -n w-0 class add dev e0 parent 1: classid 1:11 htb rate 50000000bit ceil 50000000bit" in done.stdout
    assert json.loads(wantrain("emulate", two, "--dry-run", "--json").stdout)["dilation"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["two_site", "--check"], "there is no 'two_site' among the topologies (did you mean 'two_sites'?)"),
        (["two_sites"], "nothing to do; give --check, --dry-run, or a command after '--'"),
        (["two_sites", "--only", "x", "--check"], "topology 'two_sites' has no worker 'x'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(wantrain: Wantrain, arguments: list[str], said: str) -> None:
    done = wantrain("emulate", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"wantrain: {said}")
    assert done.stderr.count("\n") == 1


def test_kill_9_at_any_moment_leaves_nothing(started: Start, left_after: LeftAfter) -> None:
    for _ in range(5):
        mark, wait_s = uuid.uuid4().hex, random.uniform(0.1, 1.6)
        process = started(mark, "setsid sleep 100 & sleep 100")
        time.sleep(wait_s)
        process.kill()
        assert left_after(mark, 5.0) == [], f"killed after {wait_s:.3f} s"
    assert not any(name in {"hub", "p0", "p1", "e0"} for name in os.listdir("/sys/class/net"))
    assert not Path("/run/netns/_hub").exists()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_everything(started: Start, left_after: LeftAfter, signum: int, status: int) -> None:
    mark = uuid.uuid4().hex
    process = started(mark, "echo up; exec sleep 100")
    assert process.stdout is not None
    assert process.stdout.readline().endswith("up\n")
    process.send_signal(signum)
    assert process.wait(20) == status
    assert left_after(mark, 5.0) == []


def test_the_table_shows_uplinks_jitter_and_loss() -> None:
    link = LinkCheck("a", "b", 12.5e6, 12e6, 0.02, 0.0203, 0.002, 0.0021, 0.01, 0.012)
    check = NetworkCheck("t", 2.0, "netem", (link,), (UplinkCheck("a", 25e6, 24e6),))
    head, _, row, uplink = check_lines(check)
    assert head == "t: delay by netem, dilation 2"
    assert " ".join(row.split()) == ("a b 100 Mbit/s 96 Mbit/s 20 ms 20.3 ms jitter 2.1 ms of 2 ms loss 1.20% of 1.00%")
    assert " ".join(uplink.split()) == "a (all) 200 Mbit/s 192 Mbit/s"


@pytest.mark.root
def test_an_ordinary_user_emulates_too(run_as_nobody: Wantrain) -> None:
    done = run_as_nobody("-m", "wantrain", "emulate", "two_sites", "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
