"""Launches on a real Ray cluster of several nodes on this machine, of which some are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import make_trainer, run_ranks
from tests.launch.ray_nodes import WORKERS, Nodes, processes
from tests.small_run import write_run
from wantrain.comm.loopback import LoopbackJob
from wantrain.config import RunConfig
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory
from wantrain.topology import Topology
from wantrain.training.checkpoint import CheckpointFolder
from wantrain.training.job import Job
from wantrain.training.loop import make_optimizer, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,  # Ray gives up on a node that takes half a minute to start
    pytest.mark.timeout(1200),
]

STEPS = 100_000
"""More than there is time for: Ctrl-C ends the run."""

PATIENCE_S = 300.0

TOPOLOGY = """
[[worker]]
name = "a"
count = 2
site = "here"
flops = "0.2 GFLOP/s"
[[worker]]
name = "b"
count = 2
site = "here"
flops = "0.2 GFLOP/s"
[[link]]
within = "here"
bandwidth = "1 Gbit/s"
latency = "0.1 ms"
"""
"""Computing so slow that every worker is used."""

SECTIONS = """
[training]
steps = {steps}
batch_size = 8
num_lanes = 4
validation_samples = 8
[parallel]
topology = "{topology}"
num_stages = 2
num_replicas = 2
timeout_s = 120
[checkpoint]
every = 20
"""


def wait_for(
    what: str, happened: Callable[[], Any], launch: subprocess.Popen[str], within_s: float = PATIENCE_S
) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert launch.poll() is None, launch.communicate()
        assert time.monotonic() < deadline, f"no {what} in {within_s:g} s"
        time.sleep(0.05)


@dataclass
class Story:
    """What became of one run: a node is killed and replaced, another is killed and not replaced, Ctrl-C ends it."""

    run: RunDirectory
    first_plan: Plan
    resumed_at: list[int]
    went_on_within_s: list[float]
    status: int
    said: str

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.run.read_steps(0)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        for name in WORKERS[1:]:
            cluster.add(name, **({name: 1.0} if name == "b-0" else {}))
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "topology.toml").write_text(TOPOLOGY)
    write_run(folder / "run.toml", SECTIONS.format(topology=folder / "topology.toml", steps=STEPS))
    return folder


def start(folder: Path, nodes: Nodes, run: str, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "wantrain", "launch", str(folder / "run.toml"), "--run-dir", str(folder / run)]
    argv += ["--engine", "ray", "--address", nodes.address, *options]
    pipe, environment = subprocess.PIPE, os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(argv, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def kill_and_wait(nodes: Nodes, name: str, run: RunDirectory, launch: subprocess.Popen[str], replace: bool) -> float:
    """Kill a node, replace it or not, wait until training has gone on; return after how many seconds it did."""
    killed_at = time.time()
    nodes.kill(name)
    if replace:
        nodes.add(name)
    steps_at: list[float] = []

    def has_gone_on() -> bool:
        steps_at[:] = [record.finished_at for record in run.read_steps(0) if record.finished_at > killed_at + 1]
        return len(steps_at) > 10

    wait_for("step after a node was killed", has_gone_on, launch)
    return steps_at[0] - killed_at


def checkpoints(run: RunDirectory) -> list[int]:
    return CheckpointFolder(run.checkpoints).steps()


@pytest.fixture(scope="module")
def story(folder: Path, nodes: Nodes) -> Story:
    run = RunDirectory(folder / "run")
    launch = start(folder, nodes, "run", "--replan", "--node-wait", "15")
    wait_for("checkpoint", lambda: checkpoints(run), launch)
    plan = Plan.load(run.plan)
    seconds = [kill_and_wait(nodes, "b-1", run, launch, replace=True)]
    newest = checkpoints(run)[0]
    wait_for("checkpoint", lambda: checkpoints(run)[0] > newest, launch)
    seconds.append(kill_and_wait(nodes, "b-1", run, launch, replace=False))
    launch.send_signal(signal.SIGINT)
    said, _ = launch.communicate(timeout=PATIENCE_S)
    resumed = [int(step) for step in re.findall(r"^resumed from step (\d+)$", run.notes.read_text(), re.MULTILINE)]
    print(said)
    return Story(run, plan, resumed, seconds, launch.returncode, said)


@pytest.fixture(scope="module")
def expected(story: Story, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run to which nothing happened, under the plan that the launch began with."""
    config = RunConfig.load(story.run.config)
    run, job = RunDirectory(tmp_path_factory.mktemp("expected")), LoopbackJob(story.first_plan.world_size)
    whole = Job(config, Topology.load(story.run.topology), story.first_plan)
    optimizer = partial(make_optimizer, config.training)

    def body(rank: int) -> None:
        trainer = make_trainer(
            story.first_plan, job.member(rank), rank, model=config.model, seed=0, optimizer=optimizer
        )
        train(trainer, whole, run, False, lambda: trainer.step_number + 1 == len(story.losses))
        trainer.close()

    torch.set_num_threads(1)
    run_ranks(whole.plan.world_size, body)
    return [record.loss for record in run.read_steps(0)]


def test_training_goes_on_within_a_minute_of_a_killed_node(story: Story) -> None:
    replaced_s, replanned_s = story.went_on_within_s
    print(f"went on after {replaced_s:.1f} s with a node in its place, after {replanned_s:.1f} s without")
    assert max(story.went_on_within_s) < 60


def test_with_a_node_in_its_place_the_losses_are_the_same_bits(story: Story, expected: list[float]) -> None:
    first, second = story.resumed_at
    assert 0 < first < second
    assert story.losses[:second] == expected[:second]


def test_planned_without_the_node_the_losses_are_nearly_the_same(story: Story, expected: list[float]) -> None:
    second = story.resumed_at[1]
    assert "b-1" in story.first_plan.workers
    assert "b-1" not in Plan.load(story.run.plan).workers
    assert len(story.losses) > second + 10
    assert story.losses[second:] == pytest.approx(expected[second:], rel=1e-5)


def test_ctrl_c_ends_after_an_agreed_step_with_a_checkpoint_and_leaves_no_process(story: Story) -> None:
    assert story.status == 130, story.said
    counts = {len(story.run.read_steps(rank)) for rank in range(Plan.load(story.run.plan).world_size)}
    assert len(counts) == 1
    assert checkpoints(story.run)[0] in counts
    assert [line for _, _, line in processes() if str(story.run.path) in line] == []


def test_what_workers_say_comes_back_with_their_names(story: Story) -> None:
    rank_0 = story.first_plan.workers[0]
    assert f"{rank_0}: resumed from step {story.resumed_at[0]}" in story.said
    assert "lost worker 'b-1'" in story.said
    assert "planned without b-1" in story.said
    assert "Traceback" not in story.said
