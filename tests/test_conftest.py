"""Who runs beside whom, and the grace for measured tests: on a machine that was not ours, after two more tries."""

from __future__ import annotations

import itertools
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

TIMED = """
import os, pathlib, time, pytest

@pytest.mark.parametrize("n", range(6))
@pytest.mark.parametrize("kind", [pytest.param("alone", marks=pytest.mark.alone), "other"])
def test_it(kind, n):
    began = time.monotonic()
    time.sleep(0.1)
    pathlib.Path(__file__).with_name(f"{kind}-{n}").write_text(f"{began} {time.monotonic()}")
"""


def copy_conftest(folder: Path) -> None:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text().replace("_S = 5", "_S = 0"))


def run_tests(folder: Path, *options: str) -> str:
    """Run the tests of a folder with this project's settings and no cache; return what was said."""
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *options, str(folder)],
        env={"PATH": "", "PROC_STAT": str(folder / "stat"), "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize(("stolen", "said"), [(10, "1 skipped, 2 rerun"), (1, "1 failed, 2 rerun")])
def test_a_measured_test_that_fails_while_time_is_stolen_is_skipped(tmp_path: Path, stolen: int, said: str) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\n")
    copy_conftest(tmp_path)
    (tmp_path / "test_failing.py").write_text(FAILING.format(stolen=stolen))
    printed = run_tests(tmp_path)
    assert said in printed
    assert ("of its processors' time was stolen" in printed) == ("skipped" in said)


def test_what_is_judged_by_a_clock_has_no_other_test_beside_it(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\n")
    copy_conftest(tmp_path)
    (tmp_path / "test_timed.py").write_text(TIMED)
    printed = run_tests(tmp_path, "-n", "3")
    assert "12 passed" in printed
    times = sorted((*map(float, path.read_text().split()), path.name) for path in tmp_path.glob("*-?"))
    for (_, end, one), (begin, _, other) in itertools.pairwise(times):
        assert end <= begin or not {one[:5], other[:5]} & {"alone"}


def test_the_share_is_of_all_that_the_processors_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROC_STAT", str(tmp_path / "stat"))
    (tmp_path / "stat").write_text("cpu  100 0 100 700 0 0 0 100 50 50\ncpu0 1\n")
    before = ProcessorTime.now()
    assert before == (100, 700, 1000)
    (tmp_path / "stat").write_text("cpu  150 0 100 720 0 0 0 130 99 99\n")
    assert ProcessorTime.now().stolen_since(before) == pytest.approx(0.3)
    assert ProcessorTime.now().busy_since(before) == pytest.approx(0.8)
