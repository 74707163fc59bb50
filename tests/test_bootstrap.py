"""bootstrap.sh: what only the user can install is named in one line, with status 2, before anything is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with nothing but the script, so that no real .venv is touched."""
    shutil.copy(ROOT / "bootstrap.sh", tmp_path)
    return tmp_path


def refusal(clone: Path, argv: Sequence[str], **env: str) -> str:
    done = subprocess.run(argv, cwd=clone, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("wantrain: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(clone) == ["bootstrap.sh"]
    return done.stderr


def test_a_python_that_was_named_and_is_none_is_refused(clone: Path) -> None:
    said = refusal(clone, ["bash", "bootstrap.sh"], PYTHON="/bin/false")
    assert "PYTHON=/bin/false is not Python 3.11 or newer" in said


def test_an_old_python_is_named(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    programs = tmp_path_factory.mktemp("bin")
    (programs / "dirname").symlink_to(shutil.which("dirname") or "")
    old = programs / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    said = refusal(clone, [shutil.which("bash") or "", "bootstrap.sh"], PATH=str(programs), PYTHON="")
    assert "no Python 3.11 or newer (found Python 3.9.2)" in said
    assert "PYTHON=/path/to/python3" in said


def test_a_missing_system_package_is_named_to_an_ordinary_user(clone: Path) -> None:
    """In a mount namespace in which the folder of tc is empty."""
    ordinary = ["unshare", "-U", "-m", "--map-user=1000", "--keep-caps"]
    if subprocess.run([*ordinary, "true"], capture_output=True, check=False).returncode:
        pytest.skip("private namespaces are forbidden here")
    tc = shutil.which("tc", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if tc is None or Path(tc).resolve().parent.name != "sbin":
        pytest.skip("tc is not in a folder that can be hidden")
    hide = f"mount -t tmpfs none {Path(tc).resolve().parent}; exec bash bootstrap.sh"
    said = refusal(clone, [*ordinary, "sh", "-ec", hide])
    assert "system packages are missing" in said
    assert "iproute2" in said
