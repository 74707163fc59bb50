"""The pictures of docs/results.md, drawn from the measured records in the house style."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import network_page
from bench_network import NAME as NETWORK
from bench_network import Row, most_work, rows_of
from bench_prediction import stored_runs
from harness import RESULTS, read_results
from wantrain.report.style import BLUE, MUTED, ORANGE, RC

_DRAWN_AT = 62.5e6
"""Uplink whose steps are drawn, bytes per second: 500 Mbit/s."""


def _headline(folder: Path) -> list[Row]:
    return most_work([row for row in rows_of(read_results(NETWORK, folder)) if not row.setting.latency_s])


def throughput(folder: Path) -> Figure | None:
    """Draw tokens per second against the uplink."""
    rows = _headline(folder)
    return network_page.throughput(rows) if len({row.setting.uplink_bytes_per_s for row in rows}) > 1 else None


def one_step(folder: Path) -> Figure | None:
    """Draw one step of every system at 500 Mbit/s, side by side."""
    rows = [
        row for row in _headline(folder)
        if row.setting.uplink_bytes_per_s == _DRAWN_AT and "worked" in row.steps[-1]
    ]  # fmt: skip
    return network_page.computing(rows) if rows else None


def predicted(folder: Path) -> Figure | None:
    """Draw measured against predicted steps of whole jobs; jobs of real layers apart from sleeping ones."""
    runs = stored_runs(read_results("prediction", folder))
    if not runs:
        return None
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for is_real, color, marker, label in ((False, BLUE, "o", "layers sleep"), (True, ORANGE, "s", "a real GPT")):
        own = [run for run in runs if run.case.is_real == is_real]
        x, y = [run.predicted_s for run in own], [run.measured_s for run in own]
        axes.plot(x, y, color=color, marker=marker, linestyle="none", label=label, markersize=5)
    seconds = [each for run in runs for each in (run.predicted_s, run.measured_s)]
    ends = [min(seconds), max(seconds)]
    axes.plot(ends, ends, color=MUTED, linewidth=0.8)
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color=MUTED, alpha=0.15, lw=0)
    axes.set_xlabel("predicted seconds a step; shaded: within a tenth")
    axes.set_ylabel("measured")
    axes.legend()
    return figure


PICTURES: dict[str, tuple[str, str, Callable[[Path], Figure | None]]] = {
    "throughput": ("network", "Tokens per second against every worker's uplink", throughput),
    "one-step": ("network", "When each stage computed in one step at 500 Mbit/s, system by system", one_step),
    "predicted": ("prediction", "Predicted and measured seconds a step", predicted),
}
"""By file name: the section that shows it, what it shows, and what draws it."""


def draw(target: Path, folder: Path = RESULTS) -> None:
    """Write every picture for which there are records as SVG, on white: pages may be dark."""
    target.mkdir(exist_ok=True)
    for name, (_, _, drawn) in PICTURES.items():
        with matplotlib.rc_context(RC | {"font.family": ["DejaVu Sans", "sans-serif"], "figure.facecolor": "white"}):
            figure = drawn(folder)
            if figure is not None:
                figure.savefig(target / f"{name}.svg", metadata={"Date": None, "Creator": None})
