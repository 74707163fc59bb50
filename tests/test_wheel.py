"""What is built installs elsewhere and works there: the wheel (built from the sdist) in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

IMPORT_ALL = """
import importlib, pkgutil, wantrain, wantrain_kernels
for package in (wantrain, wantrain_kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            print(importlib.import_module(found.name).__file__)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(argv: Sequence[str | Path], folder: Path) -> str:
    """Run a program that must succeed, free of what PYTHONPATH would add; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in argv], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and from it the wheel, out of a copy of what git would publish."""
    folder = tmp_path_factory.mktemp("build")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--outdir", folder / "dist"], folder / "source")
    return folder / "dist"


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a fresh environment that borrows only the dependencies; return its folder of programs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    own = Path(
        run([programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    # A line in a .pth file adds the folder only: editable installs in it are not followed.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--ignore-installed", wheel]
    run([sys.executable, "-m", "pip", "--python", programs / "python", *install], folder)
    return programs


def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    names = run(["tar", "tzf", sdist], built)
    for name in ("LICENSE", "README.md", "setup.py", "configs/runs/demo.toml", "kernels/wantrain_kernels/reference.py"):
        assert f"/{name}\n" in names


def test_every_module_can_be_imported_from_the_wheel(elsewhere: Path, tmp_path: Path) -> None:
    files = run([elsewhere / "python", "-c", IMPORT_ALL], tmp_path).splitlines()
    sources = [path for root in ("wantrain", "kernels/wantrain_kernels") for path in (ROOT / root).rglob("*.py")]
    assert len(files) == len(sources) - 3  # the two packages themselves and __main__
    assert all(Path(file).is_relative_to(elsewhere.parent) for file in files)


def test_the_wheel_finds_its_configurations(elsewhere: Path, tmp_path: Path) -> None:
    plan = run([elsewhere / "wantrain", "plan", "demo"], tmp_path)
    assert "predicted" in plan
    dry = run([elsewhere / "wantrain", "emulate", "two_sites", "--dry-run"], tmp_path)
    assert "ip netns add a-0" in dry
    assert list(elsewhere.parent.glob("lib/*/site-packages/wantrain/configs/grafana/wantrain.json"))


def test_the_wheel_has_the_benchmarks_and_not_their_results(elsewhere: Path, tmp_path: Path) -> None:
    out = run([elsewhere / "wantrain", "bench", "network", "--show", "--uplinks", "1 Gbit/s"], tmp_path)
    assert "of bound" in out
    assert "fitted on the scheduled runs" in run([elsewhere / "wantrain", "bench", "published"], tmp_path)
    assert not list(elsewhere.parent.glob("lib/*/site-packages/wantrain/benchmarks/results"))


def test_an_installation_without_extras_pulls_no_outside_framework(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    always = {one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert {"torch", "numpy"} <= always
    heavy = {"ray", "deepspeed", "transformers", "peft", "datasets", "wandb", "tensorboard", "mkdocs-material"}
    assert heavy <= {one.name for one in asked}
    assert not heavy & always


def test_the_wheel_says_its_version(elsewhere: Path, tmp_path: Path) -> None:
    assert run([elsewhere / "wantrain", "--version"], tmp_path).startswith("wantrain 0.")
