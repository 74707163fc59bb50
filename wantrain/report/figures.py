"""The curves: loss against steps and wall clock, throughput against steps.

Records count steps from 0; what is shown counts the steps done, as the terminal does.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from wantrain.report.read import CodecLine, RunData, elapsed_s
from wantrain.report.style import BLUE, GREEN, MUTED, RED, SKY, small_figure
from wantrain.run_directory import StepRecord
from wantrain.units import format_time

MAX_POINTS = 600
"""Chosen: more points than a figure has pixels across only make the page heavier."""


MAX_NAMED = 6
"""Chosen: more names than this cover the lines they name."""


def thinned(values: Sequence[float]) -> list[float]:
    """Return at most MAX_POINTS values, each the mean of a run of neighbours."""
    size = -(-len(values) // MAX_POINTS) or 1
    runs = [values[at : at + size] for at in range(0, len(values), size)]
    return [sum(run) / len(run) for run in runs]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window of about a twentieth of the values, at each of them."""
    reach = len(values) // 40
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def loss_by_step(data: RunData) -> Figure:
    """Draw training and held-out loss against steps."""
    records = data.steps[0]
    steps = [record.step + 1.0 for record in records]
    figure = _loss(data, steps, {record.step: record.step + 1.0 for record in records})
    figure.axes[0].set_xlabel("step")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def loss_by_time(data: RunData) -> Figure:
    """Draw training and held-out loss against the wall clock; a dotted line marks where a pause was cut out."""
    records = data.steps[0]
    times, resumed = elapsed_s(records)
    figure = _loss(data, times, {record.step: time for record, time in zip(records, times, strict=True)})
    axes = figure.axes[0]
    for time in resumed:
        axes.axvline(time, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_xlabel("wall clock, dotted: resumed" if resumed else "wall clock")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 1.2, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_time(seconds) if seconds else "0"))
    return figure


def _loss(data: RunData, xs: Sequence[float], x_of_step: dict[int, float]) -> Figure:
    figure, axes = small_figure()
    losses = [record.loss for record in data.steps[0]]
    axes.plot(thinned(xs), thinned(losses), color=SKY, linewidth=0.8)
    axes.plot(thinned(xs), thinned(smoothed(losses)), color=BLUE, label="training")
    held_out = [(x_of_step[v.step], v.validation_loss) for v in data.validations if v.step in x_of_step]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=RED, marker="o", markersize=4, linewidth=1.3, label="held out")
    _mark_trigram(axes, data.summary.get("trigram_loss"))
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper right", borderaxespad=0)
    return figure


def _mark_trigram(axes: Axes, trigram: float | None) -> None:
    if trigram is not None:
        axes.axhline(trigram, color=MUTED, linewidth=1.1, linestyle=(0, (4, 2.5)), label="trigram model")


def error_by_step(lines: Sequence[CodecLine]) -> Figure:
    """Draw what the lossy codecs lost against steps, a line for each boundary and way."""
    figure, axes = small_figure()
    for line in lines:
        steps, errors = [step + 1.0 for step in line.steps], [loss.relative_error for loss in line.losses]
        axes.plot(thinned(steps), thinned(smoothed(errors)), linewidth=1.1, label=f"{line.source} → {line.target}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative error")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(lines) <= MAX_NAMED:
        axes.legend(loc="upper right", borderaxespad=0)
    return figure


def throughput(records: Sequence[StepRecord]) -> Figure:
    """Draw tokens per second against steps."""
    figure, axes = small_figure()
    rates = [record.tokens / record.step_s if record.step_s else 0.0 for record in records]
    steps = thinned([record.step + 1.0 for record in records])
    axes.plot(steps, thinned(rates), color="#8fd3bf", linewidth=0.8)
    axes.plot(steps, thinned(smoothed(rates)), color=GREEN)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens per second")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    return figure
