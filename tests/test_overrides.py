"""Values of a run file said on the command line are read as their keys' own types ask, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wantrain.config import RunConfig
from wantrain.errors import ConfigError
from wantrain.training.job import load_config


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.steps=7", "training.steps", 7),
        ("training.steps=1_000", "training.steps", 1000),
        ("training.learning_rate=.5", "training.learning_rate", 0.5),
        ("training.learning_rate = 1e-4", "training.learning_rate", 1e-4),
        ("training.clip_norm=null", "training.clip_norm", None),
        ("training.betas=[0.8, 0.9]", "training.betas", (0.8, 0.9)),
        ("parallel.max_in_flight=4,1", "parallel.max_in_flight", (4, 1)),
        ("parallel.max_in_flight=null", "parallel.max_in_flight", None),
        ("parallel.topology=worldwide", "parallel.topology", "worldwide"),
        ("parallel.forward_codec=aqsgd:4,base=bf16,first=raw:fp32", "parallel.forward_codec",
         "aqsgd:4,base=bf16,first=raw:fp32"),
        ("parallel.schedule='gpipe'", "parallel.schedule", "gpipe"),
        ("model.tied=true", "model.tied", True),
        ("data.source=7", "data.source", "7"),
        ("name=a = b", "name", "a = b"),
        ("checkpoint={ every = 5 }", "checkpoint.every", 5),
        ("checkpoint={ every = 5 }", "checkpoint.keep", 3),
        ("model.file=gpt2", "model.hidden", 768),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_key_asks(override: str, key: str, value: Any) -> None:
    found: Any = load_config("demo", overrides=[override])
    for name in key.split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stps=7", "--set: unknown key 'training.stps' (did you mean 'steps'?)"),
        ("trainer.steps=7", "--set: unknown key 'trainer' (did you mean 'training'?)"),
        ("training.steps.a=7", "--set: 'training.steps' is a value and has no keys of its own (got 'a')"),
        ("training.steps", "--set takes KEY=VALUE (got 'training.steps')"),
        ("training..steps=7", "--set takes KEY=VALUE"),
        ("training.steps=many", "--set training.steps=many: training.steps: input should be a valid integer"),
        ("training.steps=null", "training.steps: input should be a valid integer"),
        ("training.steps=0", "training.steps: input should be greater than or equal to 1 (got 0)"),
        ("parallel.max_in_flight=4,x", "parallel.max_in_flight.1: input should be a valid integer"),
        ("parallel.forward_codec=quantised:4", "did you mean 'quantized'?"),
        ("checkpoint={ everys = 5 }", "unknown key 'checkpoint.everys' (did you mean 'every'?)"),
        ("model.file=gpt3", "there is no 'gpt3' among the models (did you mean 'gpt2'?)"),
    ],
)
def test_what_can_not_be_is_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides=[override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_applied_in_their_order() -> None:
    config = load_config(
        "demo", overrides=["training.steps=7", "model.file=gpt2", "model.seq_len=64", "training.steps=8"]
    )
    assert (config.training.steps, config.model.hidden, config.model.seq_len) == (8, 768, 64)


def test_what_is_said_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--topology and --set parallel\.topology say the same thing"):
        load_config("demo", topology="lan", overrides=["parallel.topology=lan"])
    with pytest.raises(ConfigError, match=r"--data and --set data\.source"):
        load_config("demo", data="text", overrides=["data.source=text"])


def test_data_and_topology_are_taken_as_they_are() -> None:
    config = load_config("demo", data='a "b" Ω', topology="lan")
    assert (config.data.source, config.parallel.topology) == ('a "b" Ω', "lan")


def test_a_profile_is_found_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = load_config("demo", overrides=["parallel.profile=own.json"]).parallel.profile
    assert profile == str(tmp_path / "own.json")


def test_null_in_a_run_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "null.toml"
    path.write_text(
        'name = "null"\n[model]\nnum_layers = 1\nhidden = 16\nnum_heads = 2\nseq_len = 16\n'
        '[training]\nsteps = 1\nbatch_size = 1\nclip_norm = "null"\n[parallel]\nmax_in_flight = "null"\n'
    )
    config = RunConfig.load(path)
    assert (config.name, config.training.clip_norm, config.parallel.max_in_flight) == ("null", None, None)
