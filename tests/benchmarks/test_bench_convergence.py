import subprocess
import sys
from pathlib import Path

import pytest

import bench_convergence

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_differences_are_paired_by_seed_and_with_as_many_replicas() -> None:
    losses = {"fp32": (2.0, 3.0), "aqsgd fw4 bw8": (2.02, 2.97), "fp32 2 replicas": (4.0,), "gradients 4 bit": (4.1,)}
    records = [
        {"choice": name, "seed": seed, "held_out_loss": loss}
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    text = bench_convergence.table(records)
    assert "| aqsgd fw4 bw8 | 2.4950 | +1.00 %, -1.00 % | +0.00 % |" in text
    assert "| gradients 4 bit | 4.1000 | +2.50 % | +2.50 % |" in text


def test_a_row_says_how_many_times_fewer_bytes() -> None:
    experiment = bench_convergence.make_experiment(bench_convergence.make_parser().parse_args([]))
    fewer = bench_convergence.expansion(bench_convergence.CHOICES["gradients cocktail"], experiment)
    assert fewer["forward"] == fewer["backward"] == 1.0
    assert fewer["gradient"] >= 85


@pytest.mark.slow
def test_the_benchmark_trains_with_each_choice(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i} are numbers\n" for i in range(1500)))
    options = ["--samples", "32", "--epochs", "2", "--pretrain-steps", "3", "--seq-len", "32", "--hidden", "32"]
    choices = "fp32,aqsgd fw2 bw4,aqsgd fw4 bw8; gradients 4 bit"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_convergence.py"), "--data", str(text), "--smoke", "--seeds", "0",
         "--validation-samples", "8", "--choices", choices, *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "%" in line]
    assert [row.split("|")[1].strip() for row in rows][:2] == ["fp32", "aqsgd fw2 bw4"]
