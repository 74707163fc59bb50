import subprocess
import sys
from pathlib import Path

import pytest

from bench_overlap import bound_s, topology_text
from harness import append_result, read_results, spread
from wantrain.errors import TopologyError
from wantrain.topology import Topology

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("bit_per_s", "expected"), [(10e9, 2.21), (1e9, 2.89), (500e6, 5.10), (300e6, 8.10), (100e6, 23.13)]
)
def test_the_bound_is_that_of_the_published_shape(bit_per_s: float, expected: float) -> None:
    assert bound_s(8, 16, 1024 * 1600 * 4, 1024 * 1600 * 4, bit_per_s / 8) == pytest.approx(expected, abs=0.006)


def test_workers_share_nothing_but_their_own_uplink(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(topology_text(3, "500 Mbit/s"))
    topology = Topology.load(path)
    assert topology.shared_limits("w-0", "w-1") == [(("uplink", "w-0"), 62.5e6)]
    with pytest.raises(TopologyError):
        topology.worker("w-3")


def test_results_are_added_never_replaced_and_carry_where_they_were_measured(tmp_path: Path) -> None:
    append_result("x", {"a": 1}, tmp_path)
    append_result("x", {"a": 2}, tmp_path)
    records = read_results("x", tmp_path)
    assert [record["a"] for record in records] == [1, 2]
    assert {"cores", "commit", "torch", "when"} <= set(records[0]["environment"])


def test_spread_is_the_median_with_both_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


@pytest.mark.slow
def test_the_benchmark_runs_wantrain_and_torch_side_by_side() -> None:
    options = ["--rates", "500 Mbit/s", "--stages", "3", "--microbatches", "4", "--repeats", "1", "--dilation", "2"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_overlap.py"), *options, "--smoke"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = {line[2:14].strip(): float(line.split()[-7]) for line in done.stdout.splitlines() if "of the bound" in line}
    assert set(rows) == {"wantrain", "torch 1F1B", "torch GPipe"}
    assert rows["wantrain"] < rows["torch 1F1B"]
