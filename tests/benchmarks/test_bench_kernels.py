import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_bytes_are_counted_from_the_layout() -> None:
    """At 4 bits and groups of 128 a value takes 2 bytes of x, 2 of m, 2 of m′, ½ of codes and 2/128 of a scale."""
    counted = {one.name: one.bytes_moved for one in bench_kernels.operations("reference", torch.ones(8, 1024), 4)}
    packed = 8 * 1024 // 2 + 8 * 1024 // 128 * 2
    assert counted["delta_encode"] == counted["delta_decode"] == 8 * 1024 * (4 + 2 + 2) + packed
    assert counted["quantize"] == counted["dequantize"] == 8 * 1024 * 4 + packed


def test_a_backend_that_differs_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(backend: str, *options: object) -> dict[str, torch.Tensor]:
        return {"direct": torch.zeros(3) if backend == "reference" else torch.tensor([0.0, -0.0, 0.0])}

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(bench_kernels, "outcome", wrong)
    assert bench_kernels.main(["--backends", "cpu", "--interpret", "--out", str(tmp_path)]) == 1
    assert "NOT the bytes of the reference\n    direct: 2 bits" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["cuda", "nonesuch"])
def test_when_no_backend_could_be_tried_that_is_an_outcome_of_its_own(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench_kernels.main(["--backends", backend, "--interpret", "--check"]) == 2
    assert f"{backend}: not tried" in capsys.readouterr().out


def test_the_benchmark_runs_in_the_interpreter_and_keeps_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    argv = [sys.executable, "benchmarks/bench_kernels.py", "--interpret", "--repeats", "1", "--backends", "triton"]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = os.environ | {"OUT": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = map(json.loads, (tmp_path / "kernels_gpu.jsonl").read_text().splitlines())
    assert record["gpu"] is None
    assert {row["operation"] for row in record["table"]} == {"delta_encode", "delta_decode", "quantize", "dequantize"}
    assert all(row["us"] > 0 and row["share_of_copy"] > 0 for row in record["table"])
