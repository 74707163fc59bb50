"""The sandbox: what runs in it, and that nothing of it stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from wantrain.netem.sandbox import inside_sandbox, run_in_sandbox_argv, search_path, why_no_sandbox

pytestmark = pytest.mark.usefixtures("sandbox_works")

LeftAfter = Callable[[str, float], list[str]]

DROP_SYS_ADMIN = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 21, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


def sandboxed(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(run_in_sandbox_argv(command), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_the_exit_status_is_the_commands_own(script: str, status: int) -> None:
    assert sandboxed("sh", "-c", script).returncode == status


def test_inside_is_root_with_a_network_and_processes_of_its_own() -> None:
    shown = sandboxed(
        "sh", "-c", "id -u; ip -o link | wc -l; ls -A /run | wc -l; echo $PPID; ps -A -o pid= | head -n 1"
    )
    assert shown.stdout.split() == ["0", "1", "0", "1", "1"]


def test_a_missing_command_is_one_line() -> None:
    done = sandboxed("no-such-program")
    assert done.returncode == 127
    assert done.stderr == "wantrain: can't run 'no-such-program' (no such file or directory); check the command\n"


def test_only_the_sandboxs_own_namespace_counts_as_inside() -> None:
    ask = "import os; from wantrain.netem.sandbox import inside_sandbox; print(inside_sandbox())"
    python = f"{sys.executable} -c '{ask}'"
    shown = sandboxed("sh", "-c", f"{python}; ip netns add w; ip netns exec w {python}")
    assert shown.stdout.split() == ["True", "False"]
    assert not inside_sandbox()


def test_orphans_are_reaped() -> None:
    shown = sandboxed("sh", "-c", "(sleep 0.1 &); sleep 0.4; ps -A -o stat=,comm=")
    assert "ps" in shown.stdout
    assert not [line for line in shown.stdout.splitlines() if line.startswith("Z")]


def test_what_outlives_the_command_is_killed(left_after: LeftAfter) -> None:
    mark = uuid.uuid4().hex
    argv = run_in_sandbox_argv(["sh", "-c", "setsid sleep 100 & exit 3"])
    assert subprocess.run(argv, env=os.environ | {"MARK": mark}, check=False).returncode == 3
    assert left_after(mark, 0.0) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_command_once(signum: int) -> None:
    name = signal.Signals(signum).name[3:]
    script = f"n=0; trap 'n=$((n + 1))' {name}; echo up; while [ $n -eq 0 ]; do sleep 0.05; done; sleep 0.2; exit 4$n"
    with subprocess.Popen(run_in_sandbox_argv(["sh", "-c", script]), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signum)
        assert process.wait(10) == 41


def test_kill_9_at_any_moment_leaves_no_process(left_after: LeftAfter) -> None:
    script = "ip netns add w; ip link add e0 type veth peer name p0 netns w; sleep 100 & setsid sleep 100"
    for _ in range(8):
        mark, wait_s = uuid.uuid4().hex, random.uniform(0.0, 0.25)
        process = subprocess.Popen(run_in_sandbox_argv(["sh", "-c", script]), env=os.environ | {"MARK": mark})
        time.sleep(wait_s)
        process.kill()
        process.wait()
        assert left_after(mark, 5.0) == [], f"killed after {wait_s:.3f} s"


def test_forbidden_namespaces_name_the_setting_and_the_way_round() -> None:
    inner = " ".join(run_in_sandbox_argv(["true"]))
    forbid = "echo 0 >/proc/sys/user/max_user_namespaces"
    done = sandboxed("sh", "-c", f'{forbid}; {sys.executable} -c "{DROP_SYS_ADMIN}" {inner}')
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "user.max_user_namespaces is 0" in done.stderr
    assert "--no-emulation" in done.stderr


def test_root_needs_no_user_namespace() -> None:
    inner = " ".join(run_in_sandbox_argv(["ip", "netns", "add", "w"]))
    done = sandboxed("sh", "-c", f"echo 0 >/proc/sys/user/max_user_namespaces; {inner}")
    assert (done.returncode, done.stderr) == (0, "")


def test_this_machine_allows_a_sandbox() -> None:
    assert why_no_sandbox() is None


@pytest.mark.root
def test_an_ordinary_user_needs_no_root(run_as_nobody: Callable[..., Any]) -> None:
    done = run_as_nobody("-m", "wantrain.netem.sandbox", "--", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_programs_of_sbin_are_found_where_an_ordinary_users_path_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert search_path() == "/usr/bin:/bin:/usr/sbin:/sbin"
    assert sandboxed("sh", "-c", "command -v tc").returncode == 0
