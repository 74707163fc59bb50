"""A plan explained: the figures in the tables are the prediction's own."""

import io
import math

import pytest
from rich.console import Console

from tests.jobs import flat_topology, small_plan
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.report.plan_tables import (
    PlayedPlan,
    break_even_line,
    comparison_table,
    links_table,
    parts_line,
    totals_line,
    workers_table,
)
from wantrain.scheduler.cost_model import predict_and_play
from wantrain.scheduler.money import StepPrice
from wantrain.topology import PAYLOAD_SHARE

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=32)
TOPOLOGY = flat_topology(2, "8 Mbit/s")


@pytest.fixture
def played() -> PlayedPlan:
    plan = small_plan(2, 1, model=MODEL)
    prediction, played = predict_and_play(plan, TOPOLOGY, gpt_profile(MODEL, 1))
    return PlayedPlan("this plan", plan, prediction, played, StepPrice(workers=0.25, traffic=0.5))


def shown(table: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_link_is_busy_for_its_bytes_over_its_rate(played: PlayedPlan) -> None:
    pair, num_bytes = next(iter(played.step.bytes_by_link().items()))
    share = num_bytes / (PAYLOAD_SHARE * 1e6) / played.prediction.step_s
    text = shown(links_table(played, TOPOLOGY))
    assert f"{pair[0]} → {pair[1]}" in text
    assert f"{100 * share:.0f} %" in text
    assert "8 Mbit/s" in text


def test_every_worker_has_its_stage_and_memory(played: PlayedPlan) -> None:
    text = shown(workers_table(played, TOPOLOGY))
    assert all(name in text for name in played.plan.workers)
    assert "8.59 GB" in text


def test_totals_count_whole_steps_days_bytes_and_money(played: PlayedPlan) -> None:
    line = totals_line(played, 1000, 256, True)
    assert line.startswith("1,000 tokens: 4 steps, ")
    assert line.endswith(", 3.00 in the topology's currency")
    days = 4 * played.prediction.step_s / 86_400
    assert f", {days:.3g} days, " in line


def test_plans_are_compared_with_the_first(played: PlayedPlan) -> None:
    slower = PlayedPlan(
        "other", played.plan, played.prediction.model_copy(update={"step_s": 2 * played.prediction.step_s}),
        played.step, StepPrice(1.0, 0.0),
    )  # fmt: skip
    text = shown(comparison_table([played, slower], has_prices=True))
    assert "+100.0 %" in text
    assert "0.75" in text
    assert "price" not in shown(comparison_table([played], has_prices=False))


def test_the_parts_of_the_step_are_said(played: PlayedPlan) -> None:
    assert parts_line(played.prediction).startswith("step ")
    assert break_even_line(0.0).startswith("these codecs pay on no link")
    assert break_even_line(math.inf).startswith("these codecs pay on every link")
    assert break_even_line(62.5e6) == "these codecs pay on links below 500 Mbit/s"
