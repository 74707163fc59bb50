"""The page of `bench_network.py`: what was measured, as pictures and a table, in one file that asks for nothing.

Systems have a colour and a marker each, so that a print without colours keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from network_rows import HEAD, Row, best_peer_s, cells, reference
from network_setting import Setting
from wantrain.fact import write_text
from wantrain.report import html
from wantrain.report.css import CSS
from wantrain.report.style import BLUE, GREEN, INK, MUTED, NAVY, ORANGE, PURPLE, RED, SKY, house_style, to_svg
from wantrain.units import format_bandwidth, format_time

PEER_LOOKS = tuple(zip(cycle((ORANGE, RED, PURPLE, MUTED)), "os^v8phH"))
OWN_LOOKS = tuple(zip(cycle((SKY, BLUE, GREEN, INK)), "DXP*<>dhp8"))
"""Colours and markers of systems, in the order of the table; warm ones are other programs."""

_KINDS = {"forward": SKY, "backward": BLUE, "weights": NAVY}


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    names = {row.system.name: row.system.is_own for row in rows}
    found: dict[str, tuple[str, str]] = {}
    for is_own, looks in ((False, PEER_LOOKS), (True, OWN_LOOKS)):
        chosen = [name for name, own in names.items() if own == is_own]
        found |= {name: looks[i % len(looks)] for i, name in enumerate(chosen)}
    return {name: found[name] for name in names}


def throughput(rows: Sequence[Row]) -> Figure:
    """Draw tokens per second against the uplink, every system's bound as a thin line."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    looks = _looks(rows)
    for name, (color, marker) in looks.items():
        own = sorted((row for row in rows if row.system.name == name), key=lambda row: row.setting.uplink_bytes_per_s)
        rates = [row.setting.uplink_bytes_per_s * 8 for row in own]
        axes.plot(rates, [row.setting.tokens / row.step_s for row in own], color=color, marker=marker, label=name)
        if own[0].system.is_own:
            axes.plot(
                rates, [row.setting.tokens / row.bound_s for row in own], color=color, linewidth=0.8, linestyle=":"
            )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_bandwidth(rate / 8)))
    axes.set_xlabel("uplink of every worker; dotted: the bound")
    axes.set_ylabel("tokens per second")
    figure.legend(loc="outside right upper")
    return figure


def predicted(rows: Sequence[Row]) -> Figure:
    """Draw measured against predicted steps, on the line where both are equal."""
    figure = Figure(figsize=(4.9, 4.4), layout="constrained")
    axes = figure.add_subplot()
    looks = _looks(rows)
    for name, (color, marker) in looks.items():
        points = [(row.predicted_s, row.step_s) for row in rows if row.system.name == name and row.predicted_s]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle="none", label=name)
    ends = [row.step_s for row in rows if row.predicted_s]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=MUTED, linewidth=0.8)
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.set_xlabel("predicted seconds a step")
    axes.set_ylabel("measured")
    axes.legend()
    return figure


def computing(rows: Sequence[Row]) -> Figure:
    """Draw when each rank computed in one step, a panel for each system, on one scale."""
    shown = [row for row in rows if "worked" in row.steps[-1]]
    height = 0.55 + len(shown) * (0.35 + 0.11 * shown[0].setting.stages)
    figure = Figure(figsize=(11.5, height), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, shown, strict=True):
        for rank, worked in enumerate(row.steps[-1]["worked"]):
            for kind, color in _KINDS.items():
                bars = [(begin, end - begin) for what, begin, end in worked if what == kind]
                axes.broken_barh(bars, (rank - 0.42, 0.84), color=color, linewidth=0)
        axes.axvline(row.step_s, color=INK, linewidth=0.9, linestyle=":")
        axes.set_title(f"{row.system.name}: {format_time(row.step_s)}", loc="left", fontsize=9.5)
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.grid(visible=False)
    panels[-1].set_xlabel("seconds; light: forward, dark: backward, darkest: gradients of weights, white: waits")
    return figure


def render(rows: Sequence[Row]) -> str:
    """Return the page of some rows."""
    still = [row for row in rows if not row.setting.latency_s]
    parts = [_tiles(rows)]
    with house_style():
        if len({row.setting.uplink_bytes_per_s for row in still}) > 1:
            svg = to_svg(throughput(still), "tokens per second against the uplink")
            parts.append(html.section("Throughput", html.figure(svg, "Medians. What is below its dotted line waits.")))
        for setting in _drawn(rows):
            own = [row for row in rows if row.setting == setting]
            svg = to_svg(computing(own), f"when each stage computed at {setting.title}")
            parts.append(
                html.section(f"One step at {setting.title}", html.figure(svg, "A line for each stage.", "wide"))
            )
        if any(row.predicted_s for row in rows):
            svg = to_svg(predicted(rows), "predicted and measured steps")
            parts.append(
                html.section(
                    "Prediction",
                    f"<div class='grid'>{html.figure(svg, 'Predicted before it ran; the line: equal.')}</div>",
                )
            )
    parts.append(html.section("All rows", html.table(HEAD, [cells(rows, row) for row in rows], 2, 200), _about(rows)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the network costs · wantrain</title><style>{CSS}</style></head>\n"
        "<body><main><header><p>wantrain · bench network</p><h1>What the network costs</h1></header>"
        f"{''.join(parts)}<footer>{escape(_where(rows))}</footer></main></body></html>\n"
    )


def _drawn(rows: Sequence[Row]) -> list[Setting]:
    """Return the settings whose step is worth a picture: where several systems took turns on a slow network."""
    slow = [row.setting for row in rows if "worked" in row.steps[-1] and not row.setting.latency_s]
    return sorted({s for s in slow if slow.count(s) > 1}, key=lambda s: -s.uplink_bytes_per_s)[1:3]


def _tiles(rows: Sequence[Row]) -> str:
    tiles = []
    for row in rows:
        base, peer = reference(rows, row), best_peer_s(rows, row)
        if (
            row.system.forward.startswith(("aqsgd", "auto"))
            and base
            and peer
            and not row.setting.latency_s
            and row.setting.uplink_bytes_per_s < 1e9
        ):
            note = f"{peer / row.step_s:.1f}× the best other; {row.system.name}"
            tiles.append(
                html.Tile(
                    f"{row.setting.title} against 10 Gbit/s uncompressed", f"{row.step_s / base.step_s - 1:+.0%}", note
                )
            )
    return html.tiles(tiles[:6])


def _about(rows: Sequence[Row]) -> str:
    one = rows[0].setting
    return (
        f"{one.model}, {one.stages} stages, {one.microbatches} microbatches of 1 × {one.shape[1]} × {one.shape[2]};"
        f" layers sleep {format_time(one.forward_s)} forward and {format_time(one.backward_s)} backward."
        " d: dilation, by which network and compute are slowed and all times divided again. Processor: the busiest"
        " rank's own seconds a step, undilated."
    )


def _where(rows: Sequence[Row]) -> str:
    places = {
        (e["cores"], e["processor"], e["torch"], e["commit"], e["when"][:10])
        for row in rows for e in (record["environment"] for record in row.steps)
    }  # fmt: skip
    return "; ".join(
        f"{cores} cores, {processor}, torch {torch}, commit {commit}, {when}"
        for cores, processor, torch, commit, when in sorted(places)
    )


def write_page(rows: Sequence[Row], folder: Path) -> Path:
    """Write network.html beside the results; return its path."""
    path = folder / "network.html"
    write_text(path, render(rows))
    return path
