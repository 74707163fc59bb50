"""Stored runs, replayed: what is predicted now must still be what was measured then, event by event."""

import statistics

import pytest

from bench_prediction import CASES, StoredRun, job_of, stored_runs
from wantrain.scheduler.cost_model import predict, predict_and_play

STORED = stored_runs()


def test_what_was_run_are_the_cases_as_they_stand() -> None:
    assert {run.case for run in STORED} == set(CASES), "run python benchmarks/bench_prediction.py --go-on"
    assert len(CASES) >= 24
    assert sum(run.exposed_share >= 0.3 for run in STORED) >= 8


def test_step_times_are_still_predicted() -> None:
    def error(run: StoredRun) -> float:
        return abs(predict(run.plan, run.topology, run.profile).step_s / run.measured_s - 1)

    assert statistics.median(map(error, STORED)) <= 0.05
    assert max(error(run) for run in STORED if not run.case.is_real) <= 0.1
    assert max(map(error, STORED)) <= 0.2  # real layers on shared cores: their speed changes between profile and run


@pytest.mark.parametrize("run", STORED, ids=lambda run: run.case.name)
def test_every_forward_and_backward_begins_about_when_it_did(run: StoredRun) -> None:
    _, played = predict_and_play(run.plan, run.topology, run.profile)
    begins = {(event.rank, event.kind, event.microbatch): event.start_s for event in played.timeline().events}
    late_s = [start_s - begins[rank, kind, microbatch] for rank, kind, microbatch, start_s, _ in run.computing]
    assert statistics.fmean(map(abs, late_s)) <= 0.08 * run.measured_s


def test_a_case_is_predicted_before_it_is_run() -> None:
    job = job_of(CASES[0], 1e8)
    assert job.plan.prediction is not None
    assert job.plan.prediction.step_s == predict(job.plan, job.topology, job.profile).step_s
