import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench_network import at_once, missing, parse_arguments, reason, settings_of
from harness import read_results
from network_page import render
from network_rows import Row, best_peer_s, reference, rows_of
from network_setting import Setting, System, bound_s
from wantrain.errors import ConfigError, WantrainError

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_network.py"
MICROBATCH = 1024 * 1600 * 4
SMALL = Setting(62.5e6, stages=2, microbatches=4, dilation=1.0)


def record(setting: Setting, system: str, step_s: float, **more: Any) -> dict[str, Any]:
    own = {
        "setting": setting.as_dict(),
        "system": system,
        "step_s": step_s,
        "processor_s": [0.1, 0.2],
        "series": "a",
        "stolen": 0.0,
    }
    environment = {"cores": 2, "processor": "p", "torch": "2", "commit": "c", "when": "2026-01-01T00:00:00"}
    return own | {"environment": environment} | more


@pytest.mark.parametrize(
    ("bit_per_s", "expected"), [(10e9, 2.21), (1e9, 2.89), (500e6, 5.10), (300e6, 8.10), (100e6, 23.13)]
)
def test_the_bound_is_that_of_the_published_shape(bit_per_s: float, expected: float) -> None:
    bound = bound_s(16, [(MICROBATCH, MICROBATCH)] * 7, bit_per_s / 8, (0.031, 0.062))
    assert bound == pytest.approx(expected, abs=0.006)
    setting = Setting(bit_per_s / 8)
    assert setting.bound_s(System.parse("raw")) == pytest.approx(bound, rel=1e-3)  # and a header


def test_where_gradients_of_weights_may_wait_the_way_back_is_shorter() -> None:
    free = [(0.0, 0.0)] * 7
    assert bound_s(32, free, 1.0, (1.0, 2.0)) == 39 * 3.0
    assert bound_s(32, free, 1.0, (1.0, 1.0, 1.0)) == 7 + 32 * 3.0
    setting = Setting(62.5e6, microbatches=32)
    whole, split = (System.parse(name) for name in ("aqsgd", "zero bubble aqsgd"))
    plan = setting.plan(split)
    assert plan.prediction is not None
    assert setting.bound_s(split) <= plan.prediction.step_s < 0.9 * setting.bound_s(whole)


def test_latency_adds_to_the_bound_once_for_each_boundary_there_and_back() -> None:
    near, far = (bound_s(1, [(1e3, 1e3)] * 3, 1e6, (1.0, 2.0), latency_s) for latency_s in (0.0, 0.05))
    assert far - near == pytest.approx(6 * 0.05)


@pytest.mark.parametrize(
    "given",
    [
        "torch 1F1B",
        "torch GPipe + aqsgd",
        "torch 1F1B + aqsgd:3/quantized:6",
        "DeepSpeed",
        "DeepSpeed + aqsgd:4/quantized:8",
        "raw",
        "auto",
        "aqsgd:3/quantized:6",
        "wantrain raw:bf16/raw:bf16",
        "zero bubble aqsgd",
        "zero bubble raw:bf16/raw:bf16",
        "zero bubble auto",
    ],
)
def test_a_system_is_read_back_from_its_own_name(given: str) -> None:
    system = System.parse(given)
    assert System.parse(system.name) == system


@pytest.mark.parametrize(
    "given",
    [
        "torch 1F1",
        "torch 1F1B + auto",
        "DeepSpeed + auto",
        "deepspeed + raw",
        "aqsgd:99/raw:fp32",
        "nothing/raw:fp32",
        "auto/raw:fp32",
        "zero bubble",
        "zero bubble torch 1F1B",
        "zero bubble zero bubble raw",
        "torch 1F1B + zero bubble raw",
        "",
    ],
)
def test_what_is_no_system_is_refused(given: str) -> None:
    with pytest.raises((WantrainError, ValueError)):
        System.parse(given)


def test_layers_that_stages_cant_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="48 layers, which 7 stages"):
        Setting(1e6, stages=7)


def test_workers_share_nothing_but_their_own_uplink() -> None:
    topology = SMALL.topology()
    assert topology.shared_limits("w-0", "w-1") == [(("uplink", "w-0"), 62.5e6)]


def test_systems_that_do_not_fit_in_memory_together_take_turns_in_groups() -> None:
    systems = [System.parse(name) for name in ("raw", "aqsgd", "torch 1F1B", "torch GPipe", "DeepSpeed")]
    setting = Setting(1e8, microbatches=32)
    assert at_once(setting, systems, 64e9) == [systems]
    assert [len(group) for group in at_once(setting, systems, 18e9)] == [2, 3]
    assert [len(group) for group in at_once(setting, systems, 1e9)] == [1] * 5


def test_only_steps_that_the_results_lack_are_to_be_measured() -> None:
    rows = rows_of([record(SMALL, "torch 1F1B", 1.0), record(SMALL, "torch 1F1B", 1.2)])
    assert missing(rows, SMALL, System.parse("torch 1F1B"), 3) == 1
    assert missing(rows, SMALL, System.parse("raw"), 3) == 3
    assert missing(rows, Setting(1e6, stages=2), System.parse("torch 1F1B"), 3) == 3


def test_steps_that_were_measured_anew_stand_for_the_older_ones() -> None:
    given = [record(SMALL, "raw", 1.0), record(SMALL, "raw", 2.0), record(SMALL, "raw", 7.0, series="b")]
    (row,) = rows_of(given)
    assert row.seconds == [7.0]


def test_rows_are_held_against_ten_gigabit_uncompressed_and_the_best_other_program() -> None:
    fast = Setting(1.25e9, stages=2, microbatches=4, dilation=8.0)
    own = [record(fast, "wantrain raw:fp32/raw:fp32", 2.0), record(SMALL, "wantrain aqsgd:4/quantized:8", 2.2)]
    rows = rows_of([*own, record(SMALL, "torch 1F1B", 9.0), record(SMALL, "torch GPipe", 6.6)])
    base = reference(rows, rows[1])
    assert base is not None
    assert base.step_s == 2.0
    assert best_peer_s(rows, rows[1]) == 6.6
    coded = rows_of([record(SMALL, "torch 1F1B + aqsgd", 2.5)])
    assert best_peer_s(rows + coded, coded[0]) == 6.6


def test_the_page_holds_every_row_and_asks_for_nothing() -> None:
    fast = Setting(1.25e9, stages=2, microbatches=4, dilation=8.0)
    worked = {"worked": [[("forward", 0.0, 0.1), ("backward", 0.2, 0.4)]] * 2, "predicted_s": 2.1}
    systems = ("torch 1F1B", "wantrain raw:fp32/raw:fp32", "wantrain aqsgd:4/quantized:8")
    records = [record(setting, name, 2.0 + i, **worked) for setting in (fast, SMALL) for i, name in enumerate(systems)]
    page = render(rows_of(records))
    assert all(name in page for name in systems)
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert "href=" not in page.replace('xlink:href="#', "").replace('href="#', "")


def test_a_sweep_has_all_uplinks_and_then_latencies() -> None:
    settings = settings_of(parse_arguments(["--uplinks", "10 Gbit/s,100 Mbit/s", "--latencies", "10 ms"]))
    asked = [(s.uplink_bytes_per_s, s.latency_s, s.dilation) for s in settings]
    assert asked == [(1.25e9, 0.0, 8.0), (12.5e6, 0.0, 4.0), (62.5e6, 0.01, 4.0)]


def test_quick_leaves_what_the_user_says() -> None:
    args = parse_arguments(["--quick", "--stages", "2"])
    assert (args.stages, args.microbatches, args.repeats) == (2, 8, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--uplinks", "fast"], "fast"),
        (["--systems", "torch 2F2B"], "did you mean 'torch 1F1B'"),
        (["--stages", "5"], "48 layers, which 5 stages"),
        (["--model", "gpt5"], "there is no 'gpt5'"),
        (["--repeats", "0"], "at least one step"),
        (["--against", "nowhere"], "nowhere holds no network.jsonl"),
    ],
)
def test_bad_input_is_refused_with_a_reason(options: list[str], expected: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def sweep(folder: Path, *options: str) -> list[str]:
    own = ["--uplinks", "500 Mbit/s", "--latencies", "", "--stages", "2", "--microbatches", "3", "--dilation", "1"]
    return [sys.executable, str(BENCHMARK), *own, "--systems", "torch 1F1B,raw,aqsgd", "--out", str(folder), *options]


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen(sweep(tmp_path, "--repeats", "2"), stdout=subprocess.DEVNULL) as process:
        while len(read_results("network", tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    time.sleep(1.0)
    kept = read_results("network", tmp_path)
    assert not [pid for pid in os.listdir("/proc") if pid.isdecimal() and str(tmp_path) in _command(pid)]
    done = subprocess.run(sweep(tmp_path, "--repeats", "2"), capture_output=True, text=True, check=True)
    found = read_results("network", tmp_path)
    assert found[: len(kept)] == kept
    assert len(found) == 6
    assert f"6 steps, {len(kept)} of them" in done.stdout
    rows = {row.system.name: row for row in rows_of(found)}
    assert all(len(row.steps) == 2 for row in rows.values())
    assert rows["wantrain aqsgd:4/quantized:8"].step_s < rows["torch 1F1B"].step_s
    assert all(row.step_s > 0.98 * row.bound_s for row in rows.values())
    again = subprocess.run(sweep(tmp_path, "--repeats", "2"), capture_output=True, text=True, check=True)
    assert "6 steps, 6 of them" in again.stdout
    assert len(read_results("network", tmp_path)) == 6
    assert "<svg" in (tmp_path / "network.html").read_text()


def _command(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_row_of_the_plans_own_choice_keeps_what_was_chosen() -> None:
    codecs = [["aqsgd:2", "hadamard:4"], ["aqsgd:3", "hadamard:4"]]
    row = Row(replace(SMALL, stages=3), System.parse("auto"), ({"codecs": codecs},))
    assert row.title == "wantrain auto (aqsgd:2…aqsgd:3/hadamard:4)"
    widest = Row(row.setting, row.system, ({"codecs": [codecs[1], codecs[1]]},))
    assert row.payload_bytes < widest.payload_bytes
    assert row.bound_s <= widest.bound_s


def test_a_rank_that_was_killed_is_told_apart_from_one_that_says_why() -> None:
    said = 'w-0 | {"system": "raw", "turn": 0}'
    assert "memory" in reason([said], 137)
    assert reason([said, "w-1 | ValueError: no"], 1) == "w-1 | ValueError: no"


def test_a_row_counts_what_a_whole_step_sends() -> None:
    row = Row(SMALL, System.parse("raw"), ({},))
    assert row.payload_bytes >= 2 * 4 * MICROBATCH
    assert json.loads(json.dumps(SMALL.as_dict())) == SMALL.as_dict()
