"""The recipes in docs/recipes.md, each as it stands: those of several processes under torchrun, the others here."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from wantrain.codec_spec import own_codec
from wantrain.schedule import is_own

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
TIMEOUT_S = 550.0

RECIPES = {
    title: (program, expected)
    for title, program, expected in re.findall(
        r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", PAGE, re.DOTALL
    )
}
ALONE = [title for title, (program, _) in RECIPES.items() if not program.startswith("# torchrun ")]
TOGETHER = [title for title in RECIPES if title not in ALONE]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the shipped configurations are found as in a clone."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_section_is_a_recipe() -> None:
    assert list(RECIPES) == re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert len(RECIPES) == PAGE.count("```python")


@pytest.mark.parametrize("title", ALONE)
def test_a_recipe_runs_as_it_stands(title: str, folder: Path) -> None:
    program, expected = RECIPES[title]
    (folder / "recipe.py").write_text(program, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(folder / "recipe.py"), run_name="__main__")
    said = printed.getvalue()
    assert said
    assert said == (expected or said)
    check = CHECKS.get(title)
    assert check is None or check(said)


@pytest.mark.parametrize("title", TOGETHER)
def test_a_recipe_of_several_processes_runs_as_it_stands(title: str, folder: Path) -> None:
    program, _ = RECIPES[title]
    words = program.partition("\n")[0].removeprefix("# torchrun ").split()
    (folder / words[-1]).write_text(program, encoding="utf-8")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert CHECKS[title](done.stdout), done.stdout


def errors_are_in_order(said: str) -> bool:
    """Rotating first helps where one channel is large; more bits help more."""
    found = {line.split()[0]: float(line.split()[-1]) for line in said.splitlines()}
    return found["quantized:4"] > found["hadamard:4"] > found["quantized:8"] > 0


def loss_falls(said: str) -> bool:
    before, after = map(float, re.findall(r"loss ([\d.]+) became ([\d.]+),", said)[0])
    return after < 0.7 * before


def schedule_is_played(said: str) -> bool:
    predicted = re.findall(r"(\w+) is predicted to take ([\d.]+) ms", said)
    order = "0F0 0F1 0F2 0F3 0B0 0B1 0F4 0F5 0B2 0B3 0F6 0F7 0B4 0B5 0B6 0B7 0R 0S"
    return [name for name, _ in predicted] == ["gpipe", "in_pairs"] and order in said and "loss 5." in said


def compressed_is_faster(said: str) -> bool:
    raw, coded = map(float, re.findall(r"^([\d.]+) s a step", said, re.MULTILINE))
    return coded < raw


def slow_links_show(said: str) -> bool:
    rows = [[float(one) for one in re.findall(r"([\d.]+) s", line)] for line in said.splitlines()]
    return all(row == sorted(row, reverse=True) for row in rows) and rows[0][0] > rows[1][0] > rows[2][0]


CHECKS = {
    "Compare two codecs on a recorded activation": errors_are_in_order,
    "Write a new codec and train with it": loss_falls,
    "Write a new schedule, see it simulated and run": schedule_is_played,
    "Plan a topology": compressed_is_faster,
    "Sweep in a notebook": slow_links_show,
}


def test_nothing_that_a_recipe_registers_stays() -> None:
    assert own_codec("sign") is None
    assert not is_own("in_pairs")
