"""`wantrain profile` as a user meets it; what it measures is tested beside what measures it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wantrain import profiling
from wantrain.cli import main
from wantrain.netem.sandbox import why_no_sandbox
from wantrain.profile import CodecSpeed, ModelProfile
from wantrain.topology import Topology

ROOT = Path(__file__).resolve().parent.parent

TINY = "num_layers = 2\nhidden = 32\nnum_heads = 2\nseq_len = 16\nvocab_size = 64\n"

UPLINK = """
[[worker]]
name = "a"
count = 2
site = "east"
uplink = "30 Mbit/s"
[[worker]]
name = "b"
site = "west"
[[link]]
within = "east"
bandwidth = "40 Mbit/s"
latency = "1 ms"
[[link]]
between = ["east", "west"]
bandwidth = "20 Mbit/s"
latency = "10 ms"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only."""
    monkeypatch.setattr("wantrain.training.layer_profiler._ENOUGH_S", 0.1)
    monkeypatch.setattr("wantrain.training.codec_profiler._SHAPE", (1, 16, 256))


def environment(**more: str) -> dict[str, str]:
    known = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, known))} | more


def test_a_models_layers_are_measured_printed_and_written(
    quick: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--model", tiny, "--microbatch-size", "3", "--out", str(out)]) == 0
    profile = ModelProfile.load(out)
    assert (profile.microbatch_size, profile.num_layers) == (3, 4)
    assert profile.source.startswith("measured on ")
    assert "1 thread, fp32, torch " in profile.source
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["layer", "embedding", "block", "head"]
    assert "for the topology's [[worker]]: flops = \"" in printed
    assert "codec_speed = " in printed
    assert printed.endswith(f"written to {out}\n")


def test_json_is_the_profile_itself(quick: None, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--model", tiny, "--json"]) == 0
    assert ModelProfile.model_validate_json(capsys.readouterr().out).codec_speed is not None


def test_a_device_that_is_not_at_hand_has_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "v100.json"
    assert main(["profile", "--model", "gpt3_xl", "--like", "V100", "--out", str(out)]) == 0
    assert ModelProfile.load(out).reference_flops_per_s == 39e12
    assert 'flops = "39 TFLOP/s", memory = "16 GB"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure; give --model M, or start every worker with --links"),
        (["--model", "gpt_tin"], "there is no 'gpt_tin' among the models (did you mean 'gpt_tiny'?)"),
        (["--model", "gpt_tiny", "--device", "cuda:99"], "this machine can't use device 'cuda:99'"),
        (["--model", "gpt_tiny", "--like", "v1000"], "there are no published figures for 'v1000' here"),
        (["--links"], "the environment lacks MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE; start every worker with"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["profile", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"wantrain: {said}")
    assert printed.count("\n") == 1


def test_what_is_known_of_a_worker_comes_from_its_profile_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = CodecSpeed(direct_encode=1e8, direct_decode=1e8, delta_encode=1e8, delta_decode=1e8)
    layer = {"name": "x", "parameter_bytes": 4, "activation_elements": 1, "stored_bytes": 4}
    layer |= {"forward_flops": 1.0, "backward_flops": 2.0}
    known = {"microbatch_size": 1, "layers": [layer], "reference_flops_per_s": 5e9, "memory_bytes": 7 * 10**9}
    ModelProfile.model_validate(known | {"codec_speed": speed}).save(tmp_path / "p.json")
    asked: list[Any] = []
    monkeypatch.setattr(profiling, "measure_network", lambda own, *_: asked.append(own))
    for name, value in {"MASTER_ADDR": "x", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANTRAIN_SITE", "oslo")
    assert main(["profile", "--links", "--worker", "w", "--profile", str(tmp_path / "p.json")]) == 0
    assert main(["profile", "--links", "--worker", "w", "--site", "rome", "--flops", "2 TFLOP/s"]) == 0
    first, second = asked
    assert (first.site, first.flops_per_s, first.memory_bytes) == ("oslo", 5e9, 7 * 10**9)
    assert first.codec_values_per_s == pytest.approx(1e8)
    assert (second.site, second.flops_per_s, second.codec_values_per_s) == ("rome", 2e12, None)
    assert main(["profile", "--links", "--flops", "2 GB"]) == 2


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def links_argv(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "wantrain", "profile", "--links", "--out", str(out), *more]


@pytest.fixture
def emulated(tmp_path: Path) -> Callable[..., Topology]:
    """Profile an emulated network from a topology's text; return what was written."""
    if (reason := why_no_sandbox()) is not None:
        pytest.skip(reason)

    def run(text: str) -> Topology:
        asked, out = tmp_path / "asked.toml", tmp_path / "measured.toml"
        asked.write_text(text)
        argv = [sys.executable, "-m", "wantrain", "emulate", str(asked), "--", *links_argv(out)]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Topology.load(out)

    return run


@pytest.mark.slow
@pytest.mark.measured
def test_an_emulated_network_is_found_as_it_was_asked_for(emulated: Callable[..., Topology], tmp_path: Path) -> None:
    measured = emulated(UPLINK)
    asked = Topology.load(tmp_path / "asked.toml")
    assert [worker.name for worker in measured.workers] == ["a-0", "a-1", "b"]
    sites = [worker.site for worker in measured.workers]
    assert sites[0] == sites[1] != sites[2]
    for a, b, link in asked.pairs():
        found = measured.link(a.name, b.name)
        assert found.bandwidth_bytes_per_s == pytest.approx(asked.send_limit_bytes_per_s(a.name, b.name), rel=0.1)
        assert found.latency_s == pytest.approx(link.latency_s, rel=0.1, abs=2e-3)
    uplinks = [worker.uplink_bytes_per_s for worker in measured.workers]
    assert uplinks == [pytest.approx(30e6 / 8, rel=0.1)] * 2 + [None]


def test_a_worker_that_never_comes_is_named_at_the_others(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "3"}
    argv = links_argv(tmp_path / "t.toml", "--timeout", "4")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(argv, env=environment(**place, RANK=rank), **pipes) for rank in "02"]
    said = [worker.communicate(timeout=60)[1].splitlines()[-1] for worker in workers]
    assert said == ["wantrain: not all workers came within 4 s (rank 1 did not); are all running?"] * 2
    assert [worker.returncode for worker in workers] == [1, 1]
    assert not (tmp_path / "t.toml").exists()


def test_ctrl_c_ends_it_without_a_trace(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "RANK": "0"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    worker = subprocess.Popen(links_argv(tmp_path / "t.toml"), env=environment(**place), **pipes)
    assert worker.stderr is not None
    assert worker.stderr.readline() == "waiting for 2 workers\n"
    time.sleep(0.3)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(30) == 130
    assert worker.communicate()[1] == ""


@pytest.mark.alone
def test_two_processes_on_one_machine_profile_their_link(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    argv = links_argv(tmp_path / "t.toml", "--json")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([*argv, "--worker", f"w-{rank}"], env=environment(**place, RANK=rank), **pipes)
        for rank in "01"
    ]
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert printed[1] == ""
    links = json.loads(printed[0])["links"]
    assert [(one["source"], one["target"]) for one in links] == [("w-0", "w-1"), ("w-1", "w-0")]
    assert all(one["bandwidth_bytes_per_s"] > 10e6 for one in links)
    found = Topology.load(tmp_path / "t.toml")
    assert [worker.site for worker in found.workers] == ["site-0", "site-0"]
    assert found.link("w-0", "w-1").latency_s < 5e-3
