from __future__ import annotations

import io

import pytest
from rich.console import Console

from wantrain.report.read import LinkUse
from wantrain.watching.frame import Frame, WorkerRow
from wantrain.watching.view import bar, picture, render, spark

FRAME = Frame(
    name="demo",
    model="gpt, 2 × 1 on two_sites",
    state="running",
    steps_done=42,
    num_steps=300,
    loss=2.134,
    validation_loss=2.2,
    tokens_per_s=6012.0,
    step_s=0.68,
    left_s=201.0,
    age_s=0.3,
    losses=tuple(3.0 - i / 50 for i in range(42)),
    workers=(
        WorkerRow("paris-0", 0, 0, 41, 0.68, 0.66, {"tokyo-0": 0.24, "paris-1": 0.001}),
        WorkerRow("tokyo-0", 1, 0, 41, 0.68, 0.5, {}),
    ),
    links=(LinkUse("paris-0", "tokyo-0", 8e6, 2e6, 0.71, 12.5e6),),
    notes=("resumed from step 20",),
)


def text_of(frame: Frame) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(render(frame))
    return out.getvalue()


def test_a_frame_names_workers_links_loss_and_who_waits_for_whom() -> None:
    said = text_of(FRAME)
    for words in (
        "step 42/300",
        "14 %, 3:21 left",
        "loss 2.134",
        "held out 2.200",
        "6,012 tokens/s",
        "longest wait: paris-0 for tokyo-0, 24 % of its step",
        "paris-0 → tokyo-0",
        "100 Mbit/s",
        "71 %",
        "resumed from step 20",
    ):
        assert words in said
    (row,) = [line for line in said.splitlines() if line.strip().startswith("paris-0 ") and "→" not in line]
    assert row.split()[-3:] == ["tokyo-0", "24", "%"]  # what is under half a percent is left out


def test_a_silent_run_says_for_how_long() -> None:
    assert "silent for 2:00" in text_of(FRAME.__class__(**{**FRAME.__dict__, "state": "silent", "age_s": 120.0}))


def test_the_picture_is_an_svg_that_asks_for_nothing_from_elsewhere() -> None:
    svg = picture(FRAME)
    assert svg.startswith("<svg")
    assert "tokyo-0" in svg
    assert "url(" not in svg.replace("url(#", "")
    assert len(svg) < 60_000


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], "▁"), ([3.0, 2.0, 1.0], "█▅▁"), ([1.0, 1.0], "▁▁"), ([0.0, 2.0, 4.0, 6.0], "▁█")],
)
def test_a_curve_in_one_line(values: list[float], drawn: str) -> None:
    assert spark(values, cells=3 if len(values) < 4 else 2) == drawn


def test_a_bar_is_true_to_an_eighth_of_a_cell() -> None:
    assert bar(0.5, 4) == "██  "
    assert bar(0.28125, 4) == "█▏  "
    assert bar(2.0, 4) == "████"
    assert bar(-1.0, 4) == "    "
