"""Whole launches: real torchrun processes, plainly and inside the emulated WAN."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.launches import Launch
from wantrain.config import RunConfig
from wantrain.run_directory import RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.close()


def test_three_networks_give_the_same_bits(launch: Launch) -> None:
    """The third is the host's own loopback."""
    few = ("--set", "training.steps=12")
    expected = launch.checked("whole", "--no-emulation", *few)
    for topology in ("two_sites", "lan"):
        assert launch.checked(f"run-{topology}", *few, topology=topology) == expected, topology
        assert (launch.folder / f"run-{topology}" / "report.html").exists()


def test_values_said_on_the_command_line_hold_inside_and_when_resumed(launch: Launch) -> None:
    small = ("--set", "parallel.num_replicas=1", "--set")
    status, said = launch.run("run", *small, "training.steps=6", "--set", "name=other")
    assert status == 0, said
    assert len(launch.losses("run", 1)) == 6
    config = RunConfig.load(RunDirectory(launch.folder / "run").config)
    assert (config.name, config.training.steps, config.parallel.num_replicas) == ("other", 6, 1)
    status, said = launch.run("run", *small, "training.steps=9", "--resume", "--no-emulation")
    assert status == 0, said
    assert len(launch.losses("run", 1)) == 9
    status, said = launch.run("run", *small, "model.num_heads=4", "--resume", "--no-emulation")
    assert status == 2
    assert "the checkpoint has another model" in said


def test_a_second_launch_into_the_same_directory_is_refused(launch: Launch) -> None:
    (launch.folder / "run").mkdir()
    (launch.folder / "run" / "something").touch()
    status, said = launch.run("run")
    assert status == 2
    assert "is not empty" in said
    assert len(said.strip().splitlines()) == 1
