"""Machine code is kept where that is possible, made anew where its source changed, and always there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from wantrain_kernels import cpu_jit


def twice(number: int) -> int:
    return 2 * number


def thrice_from_nowhere() -> Callable[[int], int]:
    """Return a function without a source file, for whose code numba finds no place."""
    names: dict[str, Callable[[int], int]] = {}
    exec(compile("def thrice(number):\n    return 3 * number\n", "<nowhere>", "exec"), names)
    return names["thrice"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def files_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}


def test_machine_code_is_kept_and_loaded(folder: Path) -> None:
    assert cpu_jit.kernel(twice)(21) == 42
    kept = files_in(folder)
    assert len(kept) == 2  # an index and the code
    assert cpu_jit.kernel(twice)(4) == 8
    assert files_in(folder) == kept


def test_a_change_in_any_source_makes_new_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_jit.kernel(twice)(1)
    before = files_in(folder)
    monkeypatch.setattr(cpu_jit, "fingerprint", lambda: "changed")
    cpu_jit.kernel(twice)(1)
    assert len(files_in(folder)) == 2 * len(before)
    assert all(cpu_jit.fingerprint() == "changed" or name in before for name in files_in(folder))


def test_without_a_place_for_it_code_lives_as_long_as_the_process(folder: Path) -> None:
    assert cpu_jit.kernel(thrice_from_nowhere())(7) == 21
    assert files_in(folder) == {}


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("left", [b"", b"\x80\x05rubbish"])
def test_code_that_cannot_be_read_is_made_anew(folder: Path, kind: str, left: bytes) -> None:
    cpu_jit.kernel(twice)(1)
    (damaged,) = folder.rglob(kind)
    damaged.write_bytes(left)
    assert cpu_jit.kernel(twice)(5) == 10


def test_a_full_disk_is_no_reason_to_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert cpu_jit.kernel(twice)(3) == 6
    assert files_in(folder) == {}


def test_the_fingerprint_is_that_of_all_loops() -> None:
    names = {path.name for path in Path(cpu_jit.__file__).parent.glob("cpu_*.py")}
    assert {"cpu_bits.py", "cpu_loops.py", "cpu_groups.py", "cpu_kernels.py", "cpu_jit.py"} <= names
    assert len(cpu_jit.fingerprint()) == 12
