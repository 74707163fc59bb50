"""A real, short training job that everything which watches runs is shown: two workers, real processes, all sinks on."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.small_run import write_run
from wantrain.run_directory import RunDirectory, StepRecord

PATIENCE_S = 500.0

SECTIONS = """
[training]
steps = 100000
batch_size = 8
num_lanes = 4
validation_samples = 8
validate_every = 5
record_every = 5
[parallel]
topology = "two_sites"
num_stages = 2
forward_codec = "{codec}"
backward_codec = "{codec}"
[checkpoint]
every = 1000
[watch.tensorboard]
[watch.wandb]
mode = "offline"
[watch.prometheus]
port = 0
"""


class WatchedRun:
    """`wantrain launch` in a process of its own, which trains until it is told to stop."""

    def __init__(self, folder: Path, codec: str = "raw:bf16", environment: dict[str, str] | None = None) -> None:
        config = write_run(folder / "run.toml", SECTIONS.format(codec=codec), "watched")
        self.run = RunDirectory(folder / "run")
        argv = [sys.executable, "-m", "wantrain", "launch", str(config), "--no-emulation", "--run-dir", self.run.path]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            argv, env=os.environ | (environment or {}), stdout=pipe, stderr=pipe, text=True
        )
        self.said = ""

    def wait_for_step(self, step: int) -> None:
        """Return once rank 0 has done so many steps."""
        self._wait(lambda: len(self.steps()) > step)

    def wait_for_endpoints(self) -> list[str]:
        """Return where the workers' figures can be scraped, rank by rank, once all answer."""
        files = [self.run.path / "prometheus" / f"rank-{rank}.json" for rank in range(2)]
        self._wait(lambda: all(file.exists() for file in files))
        return [json.loads(file.read_text())[0]["targets"][0] for file in files]

    def _wait(self, is_there: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_there():
            self.raise_if_ended()
            assert time.monotonic() < deadline_s, "no progress"
            time.sleep(0.1)

    def raise_if_ended(self) -> None:
        assert self._process.poll() is None, self._process.communicate()

    def steps(self, rank: int = 0) -> list[StepRecord]:
        return self.run.read_steps(rank)

    def stop(self) -> int:
        """Have it end after the step at hand, as Ctrl-C would; return its exit status."""
        self.run.stop.touch()
        out, err = self._process.communicate(timeout=PATIENCE_S)
        self.said = out + err
        return self._process.returncode

    def kill(self) -> None:
        """End it however it stands."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def fetch(url: str) -> str:
    """Return what a server answers."""
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


class Watched(NamedTuple):
    """A real run that all sinks watched, and what its workers' endpoints said while it ran."""

    run: RunDirectory
    scraped: tuple[str, ...]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One short run for all tests of what watches runs, in whichever process they are; stopped as Ctrl-C would."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "watched"
    folder.mkdir(exist_ok=True)
    scraped = [folder / f"scraped-{rank}.txt" for rank in range(2)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _train_and_scrape(folder, scraped)
            (folder / "done").touch()
    return Watched(RunDirectory(folder / "run"), tuple(path.read_text() for path in scraped))


def _train_and_scrape(folder: Path, scraped: list[Path]) -> None:
    job = WatchedRun(folder, environment={"XDG_CACHE_HOME": str(folder / "cache")})
    try:
        places = job.wait_for_endpoints()
        job.wait_for_step(12)
        for place, path in zip(places, scraped, strict=True):
            path.write_text(fetch(f"http://{place}/metrics"))
        assert job.stop() == 130, job.said
    finally:
        job.kill()
