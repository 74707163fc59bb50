from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from wantrain.report.tables import (
    deviation,
    is_latency_off,
    is_rate_off,
    layer_range,
    network_table,
    percent,
    plan_table,
    print_network,
    print_plan,
    print_summary,
    with_sites,
)
from wantrain.run_directory import LinkMeasurement, NetworkRecord, RunDirectory


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def link(rate: float = 100.0, latency_s: float = 0.02) -> LinkMeasurement:
    return LinkMeasurement(
        source="a",
        target="b",
        asked_bytes_per_s=100.0,
        measured_bytes_per_s=rate,
        asked_latency_s=0.02,
        measured_latency_s=latency_s,
    )


def test_shares_and_deviations_are_printed_with_their_sign():
    assert percent(0.364) == "36 %"
    assert deviation(103.2, 100.0) == "+3.2 %"
    assert deviation(80.0, 100.0) == "-20.0 %"
    assert deviation(1.0, 0.0) == "–"


@pytest.mark.parametrize(("rate", "is_off"), [(96.0, False), (104.0, False), (94.0, True), (106.0, True)])
def test_a_rate_is_off_by_more_than_a_twentieth(rate, is_off):
    assert is_rate_off(link(rate=rate)) == is_off


@pytest.mark.parametrize(("latency_s", "is_off"), [(0.0209, False), (0.0212, True), (0.0185, True)])
def test_a_latency_is_off_by_more_than_a_millisecond(latency_s, is_off):
    assert is_latency_off(link(latency_s=latency_s)) == is_off


def test_the_plan_names_every_worker_with_its_site_and_layers(plan, topology):
    out = console()
    print_plan(plan, topology, out)
    for words in (
        "layers 0–3",
        "layers 4–7",
        "oregon-0 (oregon)",
        "virginia-1 (virginia)",
        "8 × 1",
        "predicted: 620 ms",
    ):
        assert words in text(out)
    assert plan_table(plan).row_count == 2


def test_a_worker_outside_the_topology_is_named_alone(topology):
    assert with_sites(["oregon-0", "elsewhere"], topology) == ["oregon-0 (oregon)", "elsewhere"]
    assert with_sites(["oregon-0"], None) == ["oregon-0"]


def test_a_single_layer_is_no_range(plan):
    stage = plan.stages[0]
    assert layer_range(stage) == "0–3"
    assert layer_range(stage.model_copy(update={"end_layer": 1})) == "0"


def test_the_network_fits_a_narrow_terminal_and_marks_what_is_off():
    record = NetworkRecord(delay_by="netem", dilation=4.0, links=(link(), link(rate=80.0), link(latency_s=0.03)))
    record = record.model_copy(update={"links": tuple(long_named(one) for one in record.links)})
    out = console(width=80)
    print_network(record, out)
    assert "time dilated 4×" in text(out)
    assert text(out).count("frankfurt-12 → singapore-3") == 3
    assert text(out).count("-20.0 % !") == text(out).count("30 !") == 1
    assert text(out).count("!") == 2
    assert network_table(record).row_count == 3


def long_named(one: LinkMeasurement) -> LinkMeasurement:
    return one.model_copy(update={"source": "frankfurt-12", "target": "singapore-3"})


def test_the_summary_tells_the_loss_beside_the_trigram_and_how_to_sample(finished_run):
    out = console(200)
    print_summary(finished_run, console=out)
    assert "1.579 nats per token; trigram model 1.907, 0.328 below it" in text(out)
    assert f"wantrain generate {finished_run.path} --prompt 'def '" in text(out)
    assert "--resume" not in text(out)


def test_a_worse_model_is_said_to_be_above(finished_run):
    finished_run.summary.write_text(json.dumps({"validation_loss": 2.0, "trigram_loss": 1.9}), encoding="utf-8")
    out = console(200)
    print_summary(finished_run, console=out)
    assert "0.100 above it" in text(out)


def test_an_interrupted_run_says_how_to_go_on_without_any_figure(tmp_path):
    out = console(200)
    run = RunDirectory(tmp_path / "my run")
    print_summary(run, interrupted=True, console=out)
    assert f"wantrain launch '{run.config}' --run-dir '{run.path}' --resume" in text(out)
    assert "loss" not in text(out)
