"""What the tests of the emulated network share: functions of a test file that run inside a sandbox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wantrain.netem.sandbox import run_in_sandbox_argv, why_no_sandbox

CHECKOUT = Path(__file__).resolve().parents[2]

_CALL = """
import json, runpy, sys
file, function, arguments = sys.argv[1:]
print("result", json.dumps(runpy.run_path(file)[function](*json.loads(arguments))))
"""


@pytest.fixture(scope="session")
def sandbox_works() -> None:
    """Skip where this machine forbids private namespaces."""
    reason = why_no_sandbox()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def in_sandbox(sandbox_works: None, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a function of this test file inside a fresh sandbox; arguments and result travel as JSON."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        program = [sys.executable, "-c", _CALL, str(request.path), function.__name__, json.dumps(arguments)]
        done = subprocess.run(
            run_in_sandbox_argv(program), env=checkout_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("result ")[2])

    return call


def checkout_environment() -> dict[str, str]:
    """Return an environment in which this checkout's packages are found from any folder."""
    known = [str(CHECKOUT), str(CHECKOUT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, known))}


@pytest.fixture
def wantrain(sandbox_works: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "wantrain", *arguments]
        return subprocess.run(argv, env=checkout_environment(), capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def run_as_nobody(sandbox_works: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run this checkout's Python, or the system's of the same version, as the user nobody; only root can."""
    if os.geteuid() != 0 or shutil.which("runuser") is None:
        pytest.skip("only root can run something as another user, by 'runuser'")
    as_nobody = ["runuser", "-u", "nobody", "--"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, f"/usr/bin/{version}"]
    python = next((one for one in candidates if subprocess.run([*as_nobody, "test", "-x", one]).returncode == 0), None)
    if python is None:
        pytest.skip(f"no {version} that every user may run")
    environment = checkout_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] += os.pathsep + sysconfig.get_path("purelib")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [*as_nobody, python, *arguments]
        return subprocess.run(argv, env=environment, cwd="/", capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def left_after() -> Callable[[str, float], list[str]]:
    """Return the processes that carry a mark in their environment, once none does or the seconds are over."""

    def left(mark: str, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while True:
            found = [folder.name for folder in Path("/proc").glob("[0-9]*") if _is_marked(folder, mark)]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    return left


def _is_marked(folder: Path, mark: str) -> bool:
    try:
        return mark.encode() in (folder / "environ").read_bytes()
    except OSError:  # it has ended, or it is another user's
        return False
