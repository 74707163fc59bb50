"""Losses on the clock of measured steps."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_time_to_loss
from bench_time_to_loss import RUNS, UNCOMPRESSED, Curve, newest, table
from harness import read_results
from network_setting import Setting, System
from pictures import loss as loss_picture

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

CURVE = Curve("aqsgd 3/6", 20, ((10, 4.0), (20, 3.0), (30, 2.5), (40, 2.6)))


def test_a_loss_is_reached_on_the_line_between_two_points() -> None:
    assert CURVE.steps_to(3.5) == 15
    assert CURVE.steps_to(2.5) == 30
    assert math.isinf(CURVE.steps_to(2.0))
    assert CURVE.loss_at(25) == 2.75
    assert CURVE.loss_at(40) == 2.6


def test_steps_of_the_first_epoch_take_their_own_time() -> None:
    assert CURVE.seconds(15, first_s=2.0, later_s=1.0) == 30
    assert CURVE.seconds(35, first_s=2.0, later_s=1.0) == 55


def curve_record(run: str, losses: list[float]) -> dict[str, Any]:
    points = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    first_steps = 20 if RUNS[run].first else 0
    return {
        "benchmark": "time_to_loss", "run": run, "model": "gpt_10m", "stages": 6, "first_steps": first_steps,
        "losses": points, "experiment": {"seed": 0},
    }  # fmt: skip


def step_record(system: str, step_s: float, microbatches: int = 16) -> dict[str, Any]:
    setting = Setting(12.5e6, model="gpt_10m", stages=6, microbatches=microbatches).as_dict()
    name = System.parse(system).name
    return {"benchmark": "network", "series": "one", "setting": setting, "system": name, "step_s": step_s}


RECORDS = [
    curve_record(UNCOMPRESSED, [4.0, 3.0, 2.0, 1.8, 1.7]),
    curve_record("aqsgd 3/6", [4.0, 3.0, 2.2, 1.8, 1.7]),
    step_record("torch 1F1B", 1.0),
    step_record("torch GPipe", 0.8),
    step_record("raw", 0.5),
    step_record(RUNS["aqsgd 3/6"].system, 0.1),
    step_record(RUNS["aqsgd 3/6"].first, 0.2),
    step_record("raw", 99.0, microbatches=32),
]


def test_the_table_holds_each_system_against_the_fastest_torch() -> None:
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table(RECORDS) if "Mbit/s" in line]
    target_steps = 40  # 80 % of 50
    assert [row[0] for row in rows] == ["torch 1F1B", "torch GPipe", "wantrain uncompressed", "wantrain aqsgd 3/6"]
    assert [row[4] for row in rows] == ["40.0", "32.0", "20.0", f"{20 * 0.2 + (target_steps - 20) * 0.1:.1f}"]
    assert [row[5] for row in rows] == ["0.80×", "1.00×", "1.60×", "5.33×"]


def test_a_curve_without_measured_steps_is_told_by_steps_alone() -> None:
    curves, timed = newest(RECORDS[:2])
    assert len(curves) == 2
    assert not timed


@pytest.mark.slow
def test_every_run_trains_and_is_not_trained_again(tmp_path: Path) -> None:
    command = [
        sys.executable, str(BENCHMARKS / "bench_time_to_loss.py"), "--model", "gpt_tiny", "--stages", "4", "--steps",
        "15", "--samples", "64", "--validation-samples", "4", "--only", "train", "--out", str(tmp_path),
    ]  # fmt: skip
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        records = read_results(bench_time_to_loss.NAME, tmp_path)
        assert [record["run"] for record in records] == list(RUNS)
    for record in records:
        losses = [loss for _, loss in record["losses"]]
        assert losses[-1] < losses[0] < 6
    assert loss_picture(tmp_path) is not None
