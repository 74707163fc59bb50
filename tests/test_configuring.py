"""`wantrain init` and `wantrain config`: what they write says every key, and reads back as the same run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from wantrain import cli
from wantrain.config import RunConfig
from wantrain.overrides import kinds_of
from wantrain.resources import shipped
from wantrain.run_file import Key, run_file_keys
from wantrain.training.job import load_config


@pytest.mark.parametrize("preset", shipped("runs"))
def test_a_written_run_file_is_the_preset_again(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{preset}.toml"
    assert cli.main(["init", str(path), "--preset", preset]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {path}, from '{preset}'; next: ")
    assert RunConfig.load(path) == load_config(preset)


def test_every_key_stands_in_it_with_its_comment_and_its_default(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    assert cli.main(["init", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    values = load_config("demo").model_dump()
    for key in (inner for table in run_file_keys() for inner in table.keys if inner.name in values[table.name]):
        assert key.doc.split(" ", 1)[0] in text
    whole = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    values = tomllib.loads("\n".join(line for line in whole.splitlines() if not line.startswith("# ")))
    assert values["name"] == "own"
    assert values["training"]["clip_norm"] == 1.0
    path.write_text("\n".join(line for line in whole.splitlines() if not line.startswith("# ")))
    assert RunConfig.load(path) == load_config("demo", overrides=["name=own"])


def check(keys: tuple[Key, ...], cls: type[BaseModel]) -> None:
    assert {key.name for key in keys} == set(cls.model_fields)
    for key in keys:
        assert key.doc, f"{cls.__name__}.{key.name} says nothing of itself"
        inner = [kind for kind in kinds_of(cls.model_fields[key.name].annotation) if issubclass(kind, BaseModel)]
        assert bool(inner) == bool(key.keys)
        if len(inner) == 1:
            check(key.keys, inner[0])


def test_the_keys_read_from_the_source_are_the_fields_and_each_is_explained() -> None:
    check(run_file_keys(), RunConfig)


def test_what_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("mine", encoding="utf-8")
    assert cli.main(["init"]) == 2
    assert capsys.readouterr().err == "wantrain: run.toml is there already; give another name, or move it away\n"
    assert Path("run.toml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "run.json"], "a run file is TOML (got 'run.json'); call it 'run.toml'"),
        (["init", "--preset", "dem"], "there is no 'dem' among the runs (did you mean 'demo'?)"),
        (["config", "demo", "--set", "training.step=1"], "unknown key 'training.step' (did you mean 'steps'?)"),
    ],
)
def test_what_can_not_be_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_resolved_run_file_reads_back_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["training.clip_norm=null", "parallel.max_in_flight=3,1", 'name=a "b"']
    arguments = ["config", "compressed", *(word for one in overrides for word in ("--set", one))]
    for suffix, more in ((".toml", []), (".json", ["--json"])):
        assert cli.main([*arguments, *more]) == 0
        path = tmp_path / f"resolved{suffix}"
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        assert RunConfig.load(path) == load_config("compressed", overrides=overrides)
