"""`wantrain bench`: the programs of `benchmarks/` by the names of their questions."""

import subprocess
import sys

import pytest

from wantrain.benching import BENCHMARKS
from wantrain.resources import benchmarks_folder


def bench(*argv: str) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "wantrain", "bench", *argv)
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_every_benchmark_is_there_and_every_program_has_a_name() -> None:
    named = {program for program, _ in BENCHMARKS.values()}
    assert named == {path.stem for path in benchmarks_folder().glob("bench_*.py")}


def test_without_a_name_they_are_listed() -> None:
    done = bench()
    assert done.returncode == 0
    assert [line.split()[2] for line in done.stdout.splitlines()] == list(BENCHMARKS)


def test_a_name_that_is_none_is_refused_in_one_line() -> None:
    done = bench("networks", "--quick")
    assert done.returncode == 2
    assert "did you mean 'network'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_options_go_on_to_the_program(name: str) -> None:
    done = bench(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {BENCHMARKS[name][0]}.py" in done.stdout
