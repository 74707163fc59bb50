"""Losses of DDP with each hook, on the clock of measured steps."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench_hooks import NAME, PLAIN, REPLICAS, step_seconds, table
from harness import read_results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

WANTRAIN = "torch DDP, wantrain hook"


def curve_record(run: str, losses: list[float]) -> dict[str, Any]:
    points = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    return {"benchmark": NAME, "run": run, "model": "m", "first_steps": 0, "losses": points, "experiment": {"seed": 0}}


def steps_record(**seconds: float) -> dict[str, Any]:
    entries = [
        {"name": {"plain": PLAIN, "ours": WANTRAIN}[name], "step_s": {"median": s}} for name, s in seconds.items()
    ]
    return {"benchmark": "replicas", "model": "m", "uplink": "100 Mbit/s", "entries": entries}


RECORDS = [
    curve_record(PLAIN, [4.0, 3.0, 2.0, 1.8, 1.7]),
    curve_record(WANTRAIN, [4.0, 3.5, 2.2, 1.9, 1.8]),
    steps_record(plain=9.0, ours=9.0),
    steps_record(plain=4.0, ours=0.5),
]


def test_the_table_tells_seconds_until_the_loss_without_a_hook() -> None:
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table(RECORDS) if "Mbit/s" in line]
    assert rows == [
        [PLAIN, "4.000", "40", "160.0", "1.00×", "1.7000"],
        [WANTRAIN, "0.500", "50", "25.0", "6.40×", "1.8000"],
    ]


def test_steps_are_the_newest_of_the_same_model_and_network() -> None:
    assert step_seconds(RECORDS, "m", "100 Mbit/s") == {PLAIN: 4.0, WANTRAIN: 0.5}
    assert step_seconds(RECORDS, "m", "1 Gbit/s") == {}
    assert step_seconds(RECORDS, "other", "100 Mbit/s") == {}


@pytest.mark.slow
def test_every_kind_of_hook_trains_and_is_not_trained_again(tmp_path: Path) -> None:
    kinds = [PLAIN, "torch DDP, PowerSGD hook", WANTRAIN]
    command = [
        sys.executable, str(BENCHMARKS / "bench_hooks.py"), "--model", "gpt_tiny", "--steps", "15", "--samples", "64",
        "--validation-samples", "4", "--only", "train", "--out", str(tmp_path),
        *(word for kind in kinds for word in ("--hook", kind)),
    ]  # fmt: skip
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        records = read_results(NAME, tmp_path)
        assert [record["run"] for record in records] == kinds
    for record in records:
        losses = [loss for _, loss in record["losses"]]
        assert losses[-1] < losses[0] < 6
        assert record["replicas"] == REPLICAS
