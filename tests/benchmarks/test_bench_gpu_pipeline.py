"""The pipeline of a real GPT in processes that share a device, here the processor."""

import subprocess
import sys
from pathlib import Path

import pytest

import bench_gpu_pipeline
from harness import read_results

PROGRAM = Path(bench_gpu_pipeline.__file__)

SMALL = [
    "--device", "cpu", "--dtype", "bf16", "--model", "gpt_tiny", "--stages", "2", "--microbatches", "4", "--steps", "3",
    "--uplinks", "1 Gbit/s,4 Mbit/s", "--systems", "raw,aqsgd",
]  # fmt: skip


def test_a_peer_is_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *SMALL, "--systems", "torch 1F1B"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bench_network.py" in done.stderr


@pytest.mark.alone
@pytest.mark.slow
def test_a_slow_network_costs_and_a_codec_buys_back(tmp_path: Path) -> None:
    in_fp32 = ["--dtype", "fp32"]  # a processor without bf16 takes ten times as long in it, and hides the network
    subprocess.run([sys.executable, str(PROGRAM), *SMALL, *in_fp32, "--out", str(tmp_path)], check=True)
    fast_raw, fast_aqsgd, slow_raw, slow_aqsgd = read_results(bench_gpu_pipeline.NAME, tmp_path)
    assert [slow_raw["network"], slow_aqsgd["system"]] == ["4 Mbit/s", fast_aqsgd["system"]]
    assert slow_raw["step_s"]["median"] > 2 * fast_raw["step_s"]["median"]
    assert slow_aqsgd["step_s"]["median"] < 0.6 * slow_raw["step_s"]["median"]
    assert slow_aqsgd["first_s"] > 1.3 * slow_aqsgd["step_s"]["median"]  # the first visit is sent raw


@pytest.mark.slow
def test_without_namespaces_it_says_so_and_runs_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu_pipeline, "why_no_sandbox", lambda: "forbidden")
    monkeypatch.setattr(sys, "argv", ["bench_gpu_pipeline", *SMALL, "--systems", "raw", "--out", str(tmp_path)])
    bench_gpu_pipeline.main()
    (record,) = read_results(bench_gpu_pipeline.NAME, tmp_path)
    assert (record["network"], record["emulated"]) == ("loopback, unshaped", "nothing")
