"""Launches of a small job in processes of their own, for tests of what becomes of them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.small_run import write_run
from wantrain.run_directory import RunDirectory

SECTIONS = """
[training]
steps = 40
batch_size = 8
num_lanes = 4
validation_samples = 8
[parallel]
topology = "{topology}"
num_stages = 2
num_replicas = 2
timeout_s = 30
[checkpoint]
every = 5
"""


class Ending(NamedTuple):
    """How a launch ended, and what it left: processes, losses by rank, whole checkpoints."""

    status: int
    said: str
    processes: list[int]
    losses: list[list[float]]
    checkpoints: list[str]


class Launch:
    """A folder to launch in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def config(self, topology: str = "two_sites") -> str:
        path = self.folder / f"run-on-{Path(topology).stem}.toml"
        return str(write_run(path, SECTIONS.format(topology=topology)))

    def start(self, run: str, *options: str, topology: str = "two_sites") -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "wantrain", "launch", self.config(topology), "--run-dir", str(self.folder / run)]
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")}
        pipe = subprocess.PIPE
        if "--no-emulation" not in options:
            options += ("--dilation", "2", "--rate-tolerance", "99")  # how fast the machine is, others test
        process = subprocess.Popen([*argv, *options], env=environment, stdout=pipe, stderr=pipe, text=True)
        self._started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left; a launch takes all that it started with it."""
        for process in self._started:
            process.kill()
            process.communicate()

    def run(self, run: str, *options: str, topology: str = "two_sites") -> tuple[int, str]:
        process = self.start(run, *options, topology=topology)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    def losses(self, run: str, rank: int = 0) -> list[float]:
        return [record.loss for record in RunDirectory(self.folder / run).read_steps(rank)]

    def wait_for_step(self, process: subprocess.Popen[str], run: str, step: int) -> None:
        deadline = time.monotonic() + 300
        while len(self.losses(run)) < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.1)

    def ending(self, process: subprocess.Popen[str], run: str, patience_s: float) -> Ending:
        """Wait for the end, then so long at most for the run's other processes."""
        out, err = process.communicate(timeout=120)
        deadline = time.monotonic() + patience_s
        while self.processes(run) and time.monotonic() < deadline:
            time.sleep(0.1)
        checkpoints = sorted(path.parent.name for path in (self.folder / run).glob("checkpoints/step-*/manifest.json"))
        losses = [self.losses(run, rank) for rank in range(4)]
        return Ending(process.returncode, out + err, self.processes(run), losses, checkpoints)

    def processes(self, run: str, word: str = "") -> list[int]:
        """Return the processes that work for a run, by their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, NotADirectoryError):
                continue
            if entry.name.isdigit() and str(self.folder / run) in line and word in line:
                found.append(int(entry.name))
        return found

    def checked(self, run: str, *options: str, topology: str = "two_sites") -> list[float]:
        """Launch; return the losses of a run that nothing happened to."""
        status, said = self.run(run, *options, topology=topology)
        assert status == 0, said
        return self.losses(run)
