"""A frame says what the run directory says: of a real run, and of runs that stand otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.jobs import small_plan
from tests.watched import Watched
from wantrain.errors import ConfigError
from wantrain.plan import Plan
from wantrain.run_directory import LinkTraffic, RunDirectory, StepRecord
from wantrain.watching.frame import RunWatcher

BEGAN_AT = 1.7e9


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = BEGAN_AT

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    small_plan(2, 1).save(run.plan)
    run.metrics(0).parent.mkdir()
    run.config.write_text(json.dumps({"training": {"steps": 50}}))
    return run


def add(run: RunDirectory, rank: int, steps: range, peer: str) -> None:
    with run.metrics(rank).open("a") as file:
        for step in steps:
            record = StepRecord(
                step=step,
                loss=3.0 - step / 100,
                grad_norm=1.0,
                learning_rate=1e-3,
                tokens=100,
                step_s=2.0,
                compute_s=0.5,
                waited_s={peer: 1.0 + rank / 4},
                sent={peer: LinkTraffic(raw_bytes=4000, wire_bytes=1000, busy_s=0.5)},
                finished_at=BEGAN_AT + 2 * (step + 1),
            )
            file.write(record.model_dump_json() + "\n")


def test_a_real_run_is_shown_as_its_records_say(watched: Watched) -> None:
    frame = RunWatcher(watched.run).look()
    workers, records = Plan.load(watched.run.plan).workers, watched.run.read_steps(0)
    assert (frame.state, frame.steps_done, frame.num_steps) == ("stopped", len(records), 100000)
    assert frame.losses == tuple(record.loss for record in records)
    assert frame.validation_loss == watched.run.read_validations()[-1].validation_loss
    assert [(row.worker, row.stage, list(row.waiting)) for row in frame.workers] == [
        (workers[0], 0, [workers[1]]),
        (workers[1], 1, [workers[0]]),
    ]
    assert all(0 < row.computing < 1 and 0 < sum(row.waiting.values()) < 1 for row in frame.workers)
    assert {(link.source, link.target) for link in frame.links} == {workers, workers[::-1]}
    assert frame.has_ended
    assert "stopped after step" in frame.notes[-1]


def test_a_run_is_followed_from_before_its_first_step_to_its_end(run: RunDirectory) -> None:
    clock = Clock()
    watcher = RunWatcher(run, clock)
    frame = watcher.look()
    assert (frame.state, frame.loss, frame.workers) == ("starting", None, ())
    add(run, 0, range(10), "w-1")
    add(run, 1, range(10), "w-0")
    clock.now = BEGAN_AT + 21.0
    frame = watcher.look()
    assert (frame.state, frame.steps_done, frame.loss, frame.age_s) == ("running", 10, 2.91, 1.0)
    assert frame.tokens_per_s == 50.0
    assert frame.left_s == pytest.approx(80.0)
    assert frame.longest_wait == ("w-1", "w-0", 0.625)
    assert frame.workers[0].computing == 0.25
    assert frame.links[0].wire_bytes == 1000
    clock.now += 100
    assert watcher.look().state == "silent"
    add(run, 0, range(10, 50), "w-1")
    run.summary.write_text(json.dumps({"steps": 50, "interrupted": False}))
    assert watcher.look().state == "finished"


def test_a_run_that_goes_on_again_is_not_taken_for_ended(run: RunDirectory) -> None:
    add(run, 0, range(10), "w-1")
    run.summary.write_text(json.dumps({"steps": 10, "interrupted": True}))
    clock = Clock()
    watcher = RunWatcher(run, clock)
    assert watcher.look().state == "stopped"
    later_ns = run.summary.stat().st_mtime_ns + 1_000_000
    os.utime(run.config, ns=(later_ns, later_ns))
    assert watcher.look().state == "running"
    run.metrics(0).write_text("")
    add(run, 0, range(4), "w-1")
    frame = watcher.look()
    assert (frame.steps_done, len(frame.losses)) == (4, 4)


def test_a_disk_with_the_lines_of_other_workers_only_shows_these(run: RunDirectory) -> None:
    add(run, 1, range(3), "w-0")
    frame = RunWatcher(run, Clock()).look()
    assert (frame.steps_done, frame.loss) == (3, 2.98)
    assert [row.worker for row in frame.workers] == ["w-1"]


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        RunWatcher(RunDirectory(tmp_path))
