"""docs/watching.md is true: its tables are a run file's, its program runs, what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from wantrain.cli import main
from wantrain.config import WatchConfig
from wantrain.errors import ConfigError
from wantrain.integrations import prometheus

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_tables_are_a_run_files() -> None:
    tables = tomllib.loads(block("toml"))
    config = WatchConfig.parse(tables["watch"], ConfigError, "docs/watching.md")
    assert config.wandb is not None
    assert config.wandb.mode == "offline"


def test_every_metric_is_named_and_none_else() -> None:
    exposed = {f"wantrain_{name}{'_total' * (one.kind == 'counter')}" for name, one in prometheus._METRICS.items()}
    assert set(re.findall(r"`(wantrain_\w+)`", PAGE)) == exposed


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()


def test_the_program_runs_and_top_shows_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = tmp_path / "mine.py"
    script.write_text(block("python"), encoding="utf-8")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step \d: loss \d", done.stdout)) == 3
    assert "done" in done.stdout
    assert main(["top", str(tmp_path / "runs" / "mine"), "--once"]) == 0
    said = capsys.readouterr().out
    assert "step 3" in said
    assert "held out 5.500" in said
