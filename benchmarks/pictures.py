"""The pictures of docs/results.md, drawn from the measured records in the house style.

python benchmarks/pictures.py RESULTS FOLDER        draws what results there are; `write_results.py` does it for docs
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

import bench_time_to_loss
import network_page
from bench_planning import worldwide
from bench_prediction import stored_runs
from harness import RESULTS, read_results
from network_rows import NAME as NETWORK
from network_rows import Row, most_work, rows_of
from wantrain.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RC, RED, SKY
from wantrain.topology import Topology
from wantrain.units import format_bandwidth, format_time

_DRAWN_AT = 62.5e6
"""Uplink whose steps are drawn, bytes per second: 500 Mbit/s."""


def _headline(folder: Path) -> list[Row]:
    """Return the rows with the most work and no latency; of one that was measured with several dilations, the most."""
    rows = most_work([row for row in rows_of(read_results(NETWORK, folder)) if not row.setting.latency_s])
    slowest: dict[tuple[float, str], Row] = {}
    for row in rows:
        key = row.setting.uplink_bytes_per_s, row.system.name
        if key not in slowest or slowest[key].setting.dilation < row.setting.dilation:
            slowest[key] = row
    return list(slowest.values())


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


_TORCH_LOOKS = {"torch 1F1B": (RED, "s"), "torch GPipe": (ORANGE, "o")}
_OWN_LOOKS = ((SKY, "D"), (BLUE, "X"), (GREEN, "P"))


def loss(folder: Path) -> Figure | None:
    """Draw held-out losses against steps, and against the seconds that each network makes of them."""
    if not (records := read_results(bench_time_to_loss.NAME, folder)):
        return None
    curves, timed = bench_time_to_loss.newest(records)
    target = bench_time_to_loss.target_loss(curves)
    uplinks = sorted({one.uplink_bytes_per_s for one in timed})
    figure = Figure(figsize=(4.2 * (1 + len(uplinks)), 4.4), layout="constrained")
    by_step, *by_second = figure.subplots(1, 1 + len(uplinks), sharey=True, squeeze=False)[0]
    looks = dict(zip((f"wantrain {curve.name}" for curve in curves), _OWN_LOOKS, strict=False)) | _TORCH_LOOKS
    for curve in curves:
        name = f"wantrain {curve.name}"
        color, marker = looks[name]
        by_step.plot(*zip(*curve.points, strict=True), color=color, marker=marker, markersize=4)
    by_step.set_xlabel("steps")
    by_step.set_ylabel("held-out loss, nats per byte")
    for axes, uplink in zip(by_second, uplinks, strict=True):
        for one in timed:
            if one.uplink_bytes_per_s == uplink:
                color, marker = looks[one.system]
                axes.plot(*zip(*one.points, strict=True), color=color, marker=marker, markersize=4, label=one.system)
        axes.set_xlabel(f"seconds at {format_bandwidth(uplink)}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    for axes in (by_step, *by_second):
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=":")
    if by_second:
        handles, labels = by_second[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


_REPLICA_LOOKS = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def plan_map(folder: Path) -> Figure | None:
    """Draw where each placement of the newest run put its stages; distances are latencies, as far as a plane allows."""
    records = [one for one in read_results("planning", folder) if one["benchmark"] == "placement"]
    if not records or "stages" not in records[-1]["entries"][0]:
        return None
    last = records[-1]
    topology = worldwide(1.0, last["machines"])
    at = _places(topology)
    entries = last["entries"]
    figure = Figure(figsize=(5.2 * len(entries), 4.6), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        stages, workers = entry["stages"], entry["workers"]
        for first in range(0, len(workers), stages):
            color, line = _REPLICA_LOOKS[first // stages % len(_REPLICA_LOOKS)]
            points = [at[name] for name in workers[first : first + stages]]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, linewidth=1.5, zorder=1)
        for rank, name in enumerate(workers):
            axes.plot(*at[name], marker="o", markersize=13, color="white", markeredgecolor=INK, zorder=2)
            axes.annotate(str(rank % stages + 1), at[name], ha="center", va="center", fontsize=8, zorder=3)
        for site, members in itertools.groupby(topology.workers, key=lambda worker: worker.site):
            lowest = min((at[worker.name] for worker in members), key=lambda place: place[1])
            axes.annotate(site, lowest, (0, -16), textcoords="offset points", ha="center", fontsize=8.5, color=MUTED)
        axes.set_title(f"{entry['name']}: {format_time(entry['step_s']['median'])} a step", loc="left", fontsize=9.5)
        axes.margins(0.14)
        axes.set_axis_off()
    return figure


def _push_apart(places: NDArray[np.float64], distance: float) -> None:
    """Move what is closer than that until nothing is, each pair in its own direction, so that all can be read."""
    for _ in range(100):
        for one, two in itertools.combinations(range(len(places)), 2):
            way = places[two] - places[one]
            lacking = distance - float(np.linalg.norm(way))
            if lacking > 0:
                step = way / max(float(np.linalg.norm(way)), 1e-12) * lacking / 2
                places[one] -= step
                places[two] += step


def _places(topology: Topology) -> dict[str, tuple[float, float]]:
    """Return a place for each worker: sites by classical scaling of their latencies, a site's workers side by side."""
    sites = list(dict.fromkeys(worker.site for worker in topology.workers))
    first = {worker.site: worker.name for worker in reversed(topology.workers)}
    apart = np.array([[0 if a == b else topology.link(first[a], first[b]).latency_s for b in sites] for a in sites])
    centred = np.eye(len(sites)) - 1 / len(sites)
    values, vectors = np.linalg.eigh(-centred @ apart**2 @ centred / 2)
    plane = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0))
    plane *= np.where(plane[0] > 0, -1, 1)  # an eigenvector's sign is arbitrary: the first site is at the left, below
    beside = 0.05 * float(np.ptp(plane))
    _push_apart(plane, 4 * beside)
    seen = dict.fromkeys(sites, 0)
    places = {}
    for worker in topology.workers:
        y, x = plane[sites.index(worker.site)]
        places[worker.name] = (float(x) + beside * seen[worker.site], float(y))
        seen[worker.site] += 1
    return places


class _Speed(NamedTuple):
    """One operation's share of the speed of a copy that moves as many bytes."""

    operation: str
    bits: int
    share: float


def kernel_speeds(record: dict[str, Any]) -> dict[str, list[_Speed]]:
    """Return what a record of `bench_kernels.py` or `bench_kernels_cpu.py` says, by backend and shape."""
    found: dict[str, list[_Speed]] = {}
    for row in record.get("table", record.get("rows", [])):
        backend, shape = row.get("backend", record.get("backend")), row.get("shape", record.get("shape"))
        share = row["share_of_copy"] if "share_of_copy" in row else row["m_values_per_s"]["median"]
        share /= row.get("copy_m_values_per_s", 1.0)
        speeds = found.setdefault(f"{backend}, {' × '.join(map(str, shape))}", [])
        speeds.append(_Speed(row["operation"], row["bits"], share))
    return found


def roofline(folder: Path, name: str) -> Figure | None:
    """Draw each kernel under its roof: a copy that moves as many bytes, since all of them are bound by memory."""
    records = read_results(name, folder)
    if not records:
        return None
    panels = kernel_speeds(records[-1])
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(6.2 * len(panels), 1.1 + 0.24 * most), layout="constrained")
    for axes, (title, speeds) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ordered = sorted(speeds, key=lambda one: one.share)
        axes.barh(range(len(ordered)), [one.share for one in ordered], color=BLUE, height=0.7)
        axes.axvline(1.0, color=INK, linewidth=1.0)
        axes.set_yticks(range(len(ordered)), [f"{one.operation}, {one.bits} bits" for one in ordered])
        axes.set_xlim(0, max(1.05, *(one.share for one in ordered)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("of the speed of a copy that moves as many bytes")
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    return figure


PICTURES: dict[str, tuple[str, str, Callable[[Path], Figure | None]]] = {
    "throughput": ("network", "Tokens per second against every worker's uplink", throughput),
    "one-step": ("network", "When each stage computed in one step at 500 Mbit/s, system by system", one_step),
    "predicted": ("prediction", "Predicted and measured seconds a step", predicted),
    "kernels-gpu": ("kernels_gpu", "GPU kernels under their roof", partial(roofline, name="kernels_gpu")),
    "kernels-cpu": ("kernels_cpu", "CPU kernels under their roof", partial(roofline, name="kernels_cpu")),
    "plan-map": (
        "planning",
        "Workers, stages and pipelines of each plan; distances are latencies, but where sites would overlap",
        plan_map,
    ),
    "loss": ("time_to_loss", "Held-out loss against steps, and against seconds on each network", loss),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder of .jsonl files")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    args = parser.parse_args()
    if not args.results.is_dir():
        parser.error(f"there is no folder {args.results}")
    draw(args.folder, args.results)


if __name__ == "__main__":
    main()
