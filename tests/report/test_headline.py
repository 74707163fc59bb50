from __future__ import annotations

import json

import pytest

from wantrain.report.headline import about, headline
from wantrain.report.read import read_run


def test_the_headline_holds_result_against_trigram_and_step_against_prediction(finished_run):
    page = headline(read_run(finished_run))
    assert "1.579" in page
    assert "trigram model 1.907, 0.328 below it" in page
    assert "predicted 620 ms" in page
    assert "virginia-1 → oregon-1" in page


def test_a_run_still_going_shows_its_last_held_out_loss_and_recent_speed(finished_run):
    finished_run.summary.unlink()
    page = headline(read_run(finished_run))
    assert "last 20 steps" in page
    assert "1.579" in page  # the validation after the last step


@pytest.mark.parametrize(
    ("planned", "interrupted", "state"),
    [
        (60, False, "all done"),
        (100, False, "of 100 so far"),
        (100, True, "of 100, interrupted"),
        (None, True, "interrupted"),
        (None, False, "so far"),
    ],
)
def test_the_state_is_held_against_what_was_planned(finished_run, planned, interrupted, state):
    finished_run.summary.write_text(json.dumps({"interrupted": interrupted}), encoding="utf-8")
    finished_run.config.write_text(json.dumps({"training": {"steps": planned}} if planned else {}), encoding="utf-8")
    assert f"<dd>60</dd><p>{state}</p>" in headline(read_run(finished_run))


def test_emulation_and_dilation_are_stated(finished_run):
    assert "emulated two_sites (delay by nfqueue), time dilated 2×" in about(read_run(finished_run))


def test_a_run_without_emulation_says_so(finished_run):
    finished_run.network.unlink()
    assert "not emulated" in about(read_run(finished_run))


def test_what_else_the_summary_says_is_shown(finished_run):
    finished_run.summary.write_text(json.dumps({"emulated_compute": "8 × V100"}), encoding="utf-8")
    assert "<dt>emulated compute</dt><dd>8 × V100</dd>" in about(read_run(finished_run))
