from __future__ import annotations

import pytest

from wantrain.report.figures import MAX_POINTS, loss_by_step, loss_by_time, smoothed, thinned, throughput
from wantrain.report.read import read_run


def labels(figure) -> list[str]:
    return [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]


def test_thinning_bounds_the_points_and_keeps_the_mean():
    values = [float(i % 7) for i in range(10 * MAX_POINTS)]
    kept = thinned(values)
    assert len(kept) == MAX_POINTS
    assert sum(kept) / len(kept) == pytest.approx(sum(values) / len(values))
    assert thinned([1.0, 2.0]) == [1.0, 2.0]


def test_smoothing_keeps_a_constant_and_the_length():
    assert smoothed([3.0] * 100) == [3.0] * 100
    assert smoothed([]) == []


def test_smoothing_narrows_the_spread():
    wave = [float(i % 2) for i in range(400)]
    assert max(smoothed(wave)) - min(smoothed(wave)) < 0.2


def test_loss_stands_beside_held_out_and_trigram(finished_run):
    data = read_run(finished_run)
    assert labels(loss_by_step(data)) == ["training", "held out", "trigram model"]
    assert labels(loss_by_time(data)) == ["training", "held out", "trigram model"]


def test_loss_without_a_trigram_draws_none(finished_run):
    finished_run.summary.unlink()
    assert labels(loss_by_step(read_run(finished_run))) == ["training", "held out"]


def test_the_wall_clock_axis_says_where_a_run_went_on(finished_run, plan, write_more_steps):
    write_more_steps(range(60, 80), shift_s=3600.0)
    axes = loss_by_time(read_run(finished_run)).axes[0]
    assert axes.get_xlabel() == "wall clock, dotted: resumed"
    assert axes.get_xlim()[1] < 200  # the hour's pause is not in it


def test_throughput_starts_at_zero(finished_run):
    assert throughput(read_run(finished_run).steps[0]).axes[0].get_ylim()[0] == 0
