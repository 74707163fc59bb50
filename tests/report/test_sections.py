from __future__ import annotations

import json
from dataclasses import replace

from wantrain.report import sections
from wantrain.report.read import read_run


def test_a_link_shows_its_bytes_its_share_and_its_rate(finished_run):
    page = sections.links(read_run(finished_run))
    assert page.count("<tr>") == 1 + 8
    for words in ("36 %", "2.1 MB", "100 Mbit/s", "1 Gbit/s", "70 Mbit/s"):
        assert words in page


def test_the_waits_are_a_table_of_who_for_whom(finished_run):
    page = sections.waiting(read_run(finished_run))
    assert page.count(">waits for ") == 4
    assert "70 ms · 10 %" in page


def test_only_the_link_that_misses_its_rate_is_marked(finished_run):
    assert sections.network(read_run(finished_run)).count("number off") == 1


def test_the_plan_shows_layers_workers_depths_and_codecs(finished_run):
    page = sections.plan_grid(read_run(finished_run))
    for words in ("stage 1: layers 4–7", "virginia-0 (virginia)", "→ raw:fp32, ← raw:fp32", "0, 1", "310 MB", "4 GB"):
        assert words in page


def test_one_step_without_measurement_shows_the_prediction_and_says_so(finished_run):
    for rank in range(4):
        finished_run.timelines(rank).unlink()
    page = sections.one_step(read_run(finished_run))
    assert "No step has been recorded yet" in page
    assert "predicted: " in page
    assert "measured, step" not in page


def test_a_prediction_for_other_workers_is_not_drawn_beside_the_run(finished_run):
    stranger = json.loads(finished_run.predicted.read_text(encoding="utf-8"))
    stranger["workers"] = ["w", "x", "y", "z"]
    finished_run.predicted.write_text(json.dumps(stranger), encoding="utf-8")
    page = sections.one_step(read_run(finished_run))
    assert "predicted: " not in page
    assert "measured, step 21" in page


def test_the_config_is_folded_and_escaped(finished_run):
    page = sections.config(read_run(finished_run))
    assert "<details>" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_without_emulation_nothing_was_asked_of_the_network(finished_run):
    finished_run.network.unlink()
    assert "This run was not emulated" in sections.network(read_run(finished_run))


def test_ranks_that_find_no_room_are_counted(finished_run, monkeypatch):
    monkeypatch.setattr(sections, "MAX_RANKS", 3)
    assert "Shown: the first 3 of 4 ranks." in sections.one_step(read_run(finished_run))


def test_codecs_are_shown_from_first_to_last_and_left_out_where_all_are_raw(finished_run):
    data = read_run(finished_run)
    page = sections.codecs(data)
    assert page.count("<tr>") == 1 + 4
    assert ">0.1<" in page
    raw = tuple(tuple(record.model_copy(update={"codecs": {}}) for record in records) for records in data.steps)
    assert sections.codecs(replace(data, steps=raw)) == ""
