"""docs/many-machines.md is true: its hosts file loads, its unit and its scripts are what systemd and bash take."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from wantrain.errors import ConfigError
from wantrain.launch.hosts import Hosts

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")


def block(language: str, holds: str = "") -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    (found,) = [one for one in blocks if holds in one]
    return str(found)


def test_the_hosts_file_loads() -> None:
    hosts = Hosts.parse(tomllib.loads(block("toml")), ConfigError, "docs")
    assert [host.address for host in hosts.hosts] == ["10.77.0.1", "10.77.0.2"]
    hosts.require(["a-0", "b-0"], insecure=False)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "wantrain.service"
    unit.write_text(block("ini"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "wantrain.service" in line]) == (0, [])


def test_bash_takes_the_slurm_script_and_what_it_runs_on_each_node() -> None:
    script = block("bash", "#SBATCH")
    (inner,) = re.findall(r"bash -c '(.*?)'\n", script, re.DOTALL)
    for text in (script, inner):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
