"""A launched job that is killed in every way and resumed: nothing is left, and no loss is another."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.launch.launches import Ending, Launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happened to, without a network between."""
    return Launch(tmp_path_factory.mktemp("whole")).checked("whole", "--no-emulation")


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
    endings.append(launch.ending(launch.start("run", "--resume", "--no-emulation"), "run", 0))
    yield endings
    launch.close()


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
