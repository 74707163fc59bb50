"""Whole launches: real torchrun processes, killed and resumed, plainly and inside the emulated WAN."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from wantrain.config import RunConfig
from wantrain.run_directory import RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

CONFIG = """
name = "mini"
[model]
num_layers = 2
hidden = 32
num_heads = 2
seq_len = 32
[data]
source = "{text}"
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
        (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))

    def config(self, topology: str = "two_sites") -> str:
        path = self.folder / f"run-on-{Path(topology).stem}.toml"
        path.write_text(CONFIG.format(text=self.folder / "text.txt", topology=topology))
        return str(path)

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


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happened to, without a network between."""
    whole = Launch(tmp_path_factory.mktemp("whole"))
    status, said = whole.run("whole", "--no-emulation")
    assert status == 0, said
    return whole.losses("whole")


def press_ctrl_c(_: Launch, process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)


def kill_a_worker(launch: Launch, _: subprocess.Popen[str]) -> None:
    os.kill(launch.processes("run", "wantrain train")[-1], signal.SIGKILL)


def kill_the_launcher(_: Launch, process: subprocess.Popen[str]) -> None:
    process.kill()


MISFORTUNES: tuple[tuple[int, Callable[[Launch, "subprocess.Popen[str]"], None], float], ...] = (
    (8, press_ctrl_c, 0),
    (17, kill_a_worker, 0),
    (27, kill_the_launcher, 10),
)
"""After which step, what happens, and the seconds in which all that was started may end."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ending]]:
    """One run that meets every misfortune and is resumed after each: its four endings."""
    launch = Launch(tmp_path_factory.mktemp("unlucky"))
    endings: list[Ending] = []
    for step, happens, patience_s in MISFORTUNES:
        process = launch.start("run", *["--resume"][: len(endings)])
        launch.wait_for_step(process, "run", max(step, len(launch.losses("run")) + 2))
        happens(launch, process)
        endings.append(launch.ending(process, "run", patience_s))
    endings.append(launch.ending(launch.start("run", "--resume"), "run", 0))
    yield endings
    launch.close()


def test_three_networks_give_the_same_bits(launch: Launch, expected: list[float]) -> None:
    """The third is the host's own loopback, which `expected` was trained over."""
    for topology in ("two_sites", "lan"):
        status, said = launch.run(f"run-{topology}", topology=topology)
        assert status == 0, said
        assert launch.losses(f"run-{topology}") == expected, topology
        assert (launch.folder / f"run-{topology}" / "report.html").exists()


def check_resumed(before: Ending, after: Ending, expected: list[float]) -> None:
    """Check that the next launch went on behind the last step of this one, with the losses of an undisturbed run."""
    assert len(before.losses[0]) < len(after.losses[0])
    assert after.losses[0] == expected[: len(after.losses[0])]


def test_ctrl_c_ends_after_an_agreed_step_with_a_checkpoint(endings: list[Ending], expected: list[float]) -> None:
    interrupted, resumed, *_ = endings
    assert interrupted.status == 130, interrupted.said
    counts = {len(losses) for losses in interrupted.losses}
    assert len(counts) == 1
    assert interrupted.checkpoints[-1] == f"step-{counts.pop():08d}"
    check_resumed(interrupted, resumed, expected)


def test_a_killed_worker_ends_the_run_in_one_line_and_resume_gives_the_same_losses(
    endings: list[Ending], expected: list[float]
) -> None:
    _, killed, resumed, _ = endings
    assert killed.status == 1
    assert "Traceback" not in killed.said
    assert [line for line in killed.said.splitlines() if line.startswith("wantrain: worker '")]
    assert killed.processes == []
    check_resumed(killed, resumed, expected)


def test_killing_the_launcher_leaves_nothing_and_resume_gives_the_same_losses(
    endings: list[Ending], expected: list[float]
) -> None:
    *_, killed, resumed = endings
    assert killed.status == -signal.SIGKILL
    assert killed.processes == []
    assert resumed.status == 0, resumed.said
    assert resumed.losses[0] == expected
    check_resumed(killed, resumed, expected)


def test_values_said_on_the_command_line_hold_inside_and_when_resumed(launch: Launch) -> None:
    small = ("--set", "parallel.num_replicas=1", "--set")
    status, said = launch.run("run", *small, "training.steps=6", "--set", "name=other")
    assert status == 0, said
    assert len(launch.losses("run", 1)) == 6
    config = RunConfig.load(RunDirectory(launch.folder / "run").config)
    assert (config.name, config.training.steps, config.parallel.num_replicas) == ("other", 6, 1)
    status, said = launch.run("run", *small, "training.steps=9", "--resume")
    assert status == 0, said
    assert len(launch.losses("run", 1)) == 9
    status, said = launch.run("run", *small, "model.num_heads=4", "--resume")
    assert status == 2
    assert "the checkpoint has another model" in said


def test_a_second_launch_into_the_same_directory_is_refused(launch: Launch) -> None:
    (launch.folder / "run").mkdir()
    (launch.folder / "run" / "something").touch()
    status, said = launch.run("run")
    assert status == 2
    assert "is not empty" in said
    assert len(said.strip().splitlines()) == 1
