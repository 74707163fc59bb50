"""The grace for measured tests: only on a machine that was not ours, and only after two more tries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import ProcessorTime

ROOT = Path(__file__).resolve().parent.parent

FAILING = """
import os, pathlib, pytest

@pytest.mark.measured
def test_it():
    path = pathlib.Path(os.environ["PROC_STAT"])
    ticks = path.read_text().split()
    ticks[4], ticks[8] = str(int(ticks[4]) + 100), str(int(ticks[8]) + {stolen})
    path.write_text(" ".join(ticks) + "\\n")
    assert 2.9 < 2.0
"""


@pytest.mark.parametrize(("stolen", "said"), [(10, "1 skipped, 2 rerun"), (1, "1 failed, 2 rerun")])
def test_a_measured_test_that_fails_while_time_is_stolen_is_skipped(tmp_path: Path, stolen: int, said: str) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text().replace("_S = 5", "_S = 0"))
    (tmp_path / "test_failing.py").write_text(FAILING.format(stolen=stolen))
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, str(tmp_path)],
        env={"PATH": "", "PROC_STAT": str(tmp_path / "stat"), "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said in done.stdout, done.stdout + done.stderr
    assert ("of its processors' time was stolen" in done.stdout) == ("skipped" in said)


def test_the_share_is_of_all_that_the_processors_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROC_STAT", str(tmp_path / "stat"))
    (tmp_path / "stat").write_text("cpu  100 0 100 700 0 0 0 100 50 50\ncpu0 1\n")
    before = ProcessorTime.now()
    assert before == (100, 1000)
    (tmp_path / "stat").write_text("cpu  150 0 100 720 0 0 0 130 99 99\n")
    assert ProcessorTime.now().stolen_since(before) == pytest.approx(0.3)
