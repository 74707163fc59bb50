import re
from pathlib import Path
from typing import Any

import pytest

from wantrain.config import RunConfig
from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.resources import configs_folder, shipped
from wantrain.training.job import load_config, profile_of, resolve

SMALL: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden": 32, "num_heads": 2, "seq_len": 16},
    "training": {"steps": 3, "batch_size": 4},
}


def parse(**changes: Any) -> RunConfig:
    return RunConfig.parse(SMALL | changes, ConfigError, "run.toml")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training": {"steps": 3, "batch_size": 4, "sead": 1}}, r"unknown key 'training.sead' \(did you mean 'seed'"),
        ({"training": {"steps": 0, "batch_size": 4}}, "training.steps: input should be greater than or equal to 1"),
        ({"training": {"steps": 3}}, "missing key 'training.batch_size'"),
        ({"training": {"steps": 3, "batch_size": 4, "num_lanes": 3}}, "batch_size must be a multiple of num_lanes"),
        ({"parallel": {"num_replicas": 2}}, "2 replicas need a lane each"),
        ({"parallel": {"schedule": "zigzag"}}, "parallel.schedule"),
        ({"models": {}}, "did you mean 'model'"),
        ({"training": {"steps": 1, "batch_size": 1, "fix_variance_after": 3}}, 'is for optimizer = "quantized_adam"'),
        ({"training": {"steps": 9, "batch_size": 1, "warmup_steps": 4, "fix_variance_after": 3,
                       "optimizer": "quantized_adam"}}, "v can't be fixed before the rate is warm"),
        ({"buffers": {"ram": "2"}}, "buffers.ram: size has no unit"),
        ({"buffers": {"on_checkpoint": "forget"}}, "buffers.on_checkpoint: input should be 'keep' or 'drop'"),
    ],
)  # fmt: skip
def test_a_bad_run_file_is_one_line(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(**changes)
    assert str(caught.value).startswith("run.toml: ")
    assert "\n" not in str(caught.value)


def test_a_model_file_is_found_beside_the_run_file_and_its_keys_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("num_layers = 2\nhidden = 32\nnum_heads = 2\nseq_len = 16\n")
    run = tmp_path / "run.toml"
    run.write_text('[model]\nfile = "m.toml"\nseq_len = 8\n[training]\nsteps = 1\nbatch_size = 1\n')
    model = RunConfig.load(run).model
    assert (model.hidden, model.seq_len) == (32, 8)


def test_a_profile_is_found_beside_the_run_file_and_must_be_the_models(tmp_path: Path) -> None:
    text = """
    [model]
    num_layers = 2
    hidden = {hidden}
    num_heads = 2
    seq_len = 16
    [training]
    steps = 1
    batch_size = 4
    microbatch_size = {size}
    [parallel]
    profile = "profile.json"
    """
    model = ModelConfig(num_layers=2, hidden=32, num_heads=2, seq_len=16)
    measured = gpt_profile(model, 2).model_copy(update={"source": "measured", "reference_flops_per_s": 5e9})
    measured.save(tmp_path / "profile.json")
    run = tmp_path / "run.toml"
    run.write_text(text.format(hidden=32, size=2))
    assert profile_of(RunConfig.load(run)) == measured
    run.write_text(text.format(hidden=64, size=2))
    with pytest.raises(ConfigError, match=r"profile is of another model \(hidden: got 32, expected 64\)"):
        profile_of(RunConfig.load(run))
    run.write_text(text.format(hidden=32, size=4))
    with pytest.raises(ConfigError, match=r"is of microbatches of 2 .*measure with --microbatch-size 4"):
        profile_of(RunConfig.load(run))


def test_buffer_budgets_are_sizes_with_a_unit() -> None:
    buffers = parse(buffers={"ram": "2 GiB", "file": "40 GB"}).buffers
    assert (buffers.ram_bytes, buffers.file_bytes, buffers.device_bytes) == (2 << 30, 40 * 10**9, 0)


def test_the_resolved_form_reads_back(tmp_path: Path) -> None:
    config = parse()
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert RunConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", shipped("runs"))
def test_shipped_run_files_load(name: str) -> None:
    path = configs_folder() / "runs" / f"{name}.toml"
    config = RunConfig.load(path)
    assert config.name == name
    is_published = config.parallel.topology.startswith(("aqsgd", "dtfm"))
    assert not is_published or re.search(r"(NeurIPS|ICML) 20\d\d", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    ["aqsgd-gpt2-xl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cocktail-gpt2", "dtfm-two-sites"))],
)
def test_published_setups_can_be_planned_within_their_machines_memory(name: str) -> None:
    job = resolve(load_config(name))
    assert job.plan.world_size == len(job.topology.workers)
    assert job.plan.prediction is not None


@pytest.mark.parametrize(
    ("given", "steps"), [({}, 20), ({"warmup_steps": 15}, 30), ({"fix_variance_after": 7}, 7), ({"steps": 3}, 1)]
)
def test_quantized_adam_learns_v_for_a_fifth_of_the_run_unless_told(given: dict[str, Any], steps: int) -> None:
    training = {"steps": 100, "batch_size": 1, "optimizer": "quantized_adam"} | given
    assert parse(training=training).training.variance_steps == steps
