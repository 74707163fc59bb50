import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bench_kernels_cpu


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_benchmark_prints_a_speed_for_every_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels_cpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (line,) = (tmp_path / "kernels_cpu.jsonl").read_text().splitlines()
    rows = json.loads(line)["rows"]
    for name in ("quantize", "dequantize", "delta_encode", "delta_decode", "hadamard_quantize", "base_store"):
        assert any(row["operation"] == name and row["m_values_per_s"]["median"] > 0 for row in rows)
        assert name in printed
    assert all(row["copy_m_values_per_s"] > 0 for row in rows)


def test_a_speed_is_never_printed_for_wrong_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(x: Tensor, bits: int, *options: object, **more: object) -> Tensor:
        return torch.zeros(bench_kernels_cpu.wk.layout_of(x.shape, bits, 128).body_bytes, dtype=torch.uint8)

    quantize = bench_kernels_cpu.wk.quantize
    monkeypatch.setattr(
        bench_kernels_cpu.wk,
        "quantize",
        lambda *args, **named: (quantize if named["backend"] == "reference" else forget)(*args, **named),
    )
    assert bench_kernels_cpu.main(["--smoke", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "NOT the bytes of the reference" in printed
    assert "M values/s" not in printed
    assert list(tmp_path.iterdir()) == []


def test_the_best_round_stands_for_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([[10.0], [3.0], [11.0], [7.0], [12.0], [5.0]])
    monkeypatch.setattr(bench_kernels_cpu, "rates", lambda run, num_values, repeats: next(speeds))
    timed = [bench_kernels_cpu.Operation("quantize", 4, lambda: None)]
    (row,) = bench_kernels_cpu.measure(torch.zeros(4), timed, 1, 3)
    assert (row["m_values_per_s"]["median"], row["copy_m_values_per_s"]) == (7.0, 11.0)
