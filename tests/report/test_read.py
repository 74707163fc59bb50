from __future__ import annotations

import pytest

from wantrain.errors import ConfigError
from wantrain.report.read import elapsed_s, link_uses, rank_times, read_run, typical
from wantrain.run_directory import RunDirectory, StepRecord
from wantrain.timeline import Event, Timeline


def record(step: int, finished_at: float, **changes: object) -> StepRecord:
    plain = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 8, "step_s": 2.0, "compute_s": 1.0}
    return StepRecord.model_validate(
        plain | {"step": step, "finished_at": finished_at, "waited_s": {}, "sent": {}} | changes
    )


def lasting(step: int, seconds: float) -> Timeline:
    return Timeline("measured", ("a",), (Event(0, "forward", 0.0, seconds, 0),), step)


def write(run: RunDirectory, rank: int, *records: StepRecord) -> None:
    run.metrics(rank).parent.mkdir(parents=True, exist_ok=True)
    run.metrics(rank).write_text("".join(r.model_dump_json() + "\n" for r in records), encoding="utf-8")


def test_a_whole_run_is_read(finished_run, plan):
    data = read_run(finished_run)
    assert data.name == "demo-two-sites"
    assert data.workers == plan.workers
    assert [len(records) for records in data.steps] == [60] * 4
    assert [v.step for v in data.validations] == [9, 19, 29, 39, 49, 59]
    assert data.predicted is not None
    assert data.measured is not None
    assert data.measured.step == 20  # of steps 0, 20 and 40, each longer than the one before
    assert (data.num_done, data.num_planned) == (60, 60)


def test_a_missing_directory_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"^no run directory at .*nowhere; give the folder"):
        read_run(RunDirectory(tmp_path / "nowhere"))


def test_a_directory_of_something_else_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_run(RunDirectory(tmp_path))


def test_a_damaged_file_is_named(finished_run):
    finished_run.network.write_text('{"delay_by": "netem"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"network\.json: missing key 'dilation'"):
        read_run(finished_run)


def test_without_a_plan_ranks_stand_for_workers(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write(run, 0, record(0, 10.0))
    write(run, 1, record(0, 10.0))
    data = read_run(run)
    assert data.workers == ("rank 0", "rank 1")
    assert data.plan is None


def test_a_step_done_twice_counts_once_with_its_last_record(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write(run, 0, record(0, 10.0), record(1, 12.0, loss=5.0), record(1, 50.0, loss=4.0), record(2, 52.0))
    (records,) = read_run(run).steps
    assert [(r.step, r.loss) for r in records] == [(0, 1.0), (1, 4.0), (2, 1.0)]


def test_the_typical_step_is_the_one_of_median_length():
    steps = [lasting(0, 9.0), lasting(10, 1.1), lasting(20, 1.0), lasting(30, 1.2), lasting(40, 1.3)]
    chosen = typical(steps)
    assert chosen is not None
    assert chosen.step == 30
    assert typical([]) is None


def test_wall_clock_cuts_pauses_out_and_keeps_slow_steps():
    records = [record(0, 100.0), record(1, 102.0), record(2, 130.0), record(3, 5000.0), record(4, 5002.0)]
    assert elapsed_s(records) == ([2.0, 4.0, 32.0, 34.0, 36.0], [32.0])


def test_link_uses_are_means_per_step_busiest_first(tmp_path):
    run = RunDirectory(tmp_path / "run")
    slow = {"rank 1": {"raw_bytes": 400, "wire_bytes": 100, "busy_s": 1.5}}
    none = {"rank 1": {"raw_bytes": 0, "wire_bytes": 0, "busy_s": 0.0}}
    write(run, 0, record(0, 2.0, sent=slow), record(1, 4.0, sent=none))
    write(run, 1, record(0, 2.0, sent={"rank 0": {"raw_bytes": 8, "wire_bytes": 8, "busy_s": 2.0}}))
    first, second = link_uses(read_run(run))
    assert (first.source, first.target, first.busy_share) == ("rank 1", "rank 0", 1.0)
    assert second == ("rank 0", "rank 1", 200, 50, 0.375, 100 / 1.5)


def test_a_rank_time_adds_up_to_the_step(finished_run):
    for time in rank_times(read_run(finished_run)):
        parts = time.compute_s + sum(time.waited_s.values()) + time.other_s
        assert parts == pytest.approx(time.step_s)
        assert time.other_s > 0
