import subprocess
import sys
from itertools import islice
from pathlib import Path

from bench_buffer import batches

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_sample_comes_once_an_epoch() -> None:
    order = [sample for samples in islice(batches(12, 4), 6) for sample in samples]
    epochs = [order[:12], order[12:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_the_benchmark_prints_speed_beside_a_buffer_that_fits(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_buffer.py"), "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    speeds = [float(line.rpartition(" ")[2].rstrip("%")) for line in done.stdout.splitlines() if " speed " in line]
    assert len(speeds) == 2
    assert min(speeds) > 0
    assert list(tmp_path.iterdir()) == []
