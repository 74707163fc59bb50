"""One step of every rank, drawn: what was predicted above what was measured, on the same scale.

    oregon-0     ▓F0▓▓F1▓░░waiting░░█B0█▒▒        what the rank does
      → paris-0       ▂▂▂▂ ▂▂▂▂                    what it has on the wire, one thin lane per link

A lane is one SVG path per kind of event, however many events it holds: a step of thousands of sends stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from wantrain.report.style import BLUE, GREEN, INK, MUTED, NAVY, ORANGE, PURPLE, RED, RULE, SKY
from wantrain.timeline import Event, Timeline
from wantrain.units import format_time

MAX_RANKS = 16
"""Chosen: more rows than this are no picture any more; the first ones stand for the rest."""

WIDTH_IN, UNITS_PER_IN = 11.5, 72.0
LABEL_IN = 1.45
LANE_IN = {"main": 0.27, "wire": 0.13}

GREY, HATCH_GREY = "#f0f1f2", "#b4bac0"


class Look(NamedTuple):
    """How a kind of event is drawn; `offset` and `height` are shares of its lane."""

    label: str
    color: str
    offset: float = 0.0
    height: float = 1.0
    edge: str = "white"
    hatch: str | None = None


LOOKS = {
    "wait": Look("waits for a tensor", GREY, edge=HATCH_GREY, hatch="////"),
    "reduce": Look("waits for gradients", "#fbe3d3", edge="#e2a37c", hatch="\\\\\\\\"),
    "forward": Look("forward", SKY),
    "backward": Look("backward", BLUE),
    "weights": Look("gradients of weights", NAVY),
    "step": Look("update", GREEN),
    "encode": Look("encode, decode", PURPLE, 0.84, 0.16),
    "tensor": Look("sends a tensor", ORANGE, 0.12, 0.76),
    "gradient": Look("sends weight gradients", RED, 0.12, 0.76),
}
"""In drawing order: later kinds lie on top."""


class Lane(NamedTuple):
    """One row: a rank's own doing (no peer) or its sends to one peer; `top` grows downwards, in inches."""

    rank: int
    peer: str | None
    top: float
    height: float


def look_of(event: Event) -> str:
    """Return the key in LOOKS; without a microbatch a send carries weight gradients, and a wait is for them."""
    if event.kind == "send":
        return "tensor" if event.microbatch >= 0 else "gradient"
    if event.kind == "wait" and event.microbatch < 0:
        return "reduce"
    return "encode" if event.kind == "decode" else event.kind


def make_lanes(timelines: Sequence[Timeline]) -> list[Lane]:
    """Lay out the lanes that any of the timelines needs, so that the same lane has the same place in each."""
    lanes: list[Lane] = []
    top = 0.0
    for rank in range(min(MAX_RANKS, len(timelines[0].workers))):
        lanes.append(Lane(rank, None, top, LANE_IN["main"]))
        top += LANE_IN["main"] + 0.03
        peers = {event.peer for timeline in timelines for event in timeline.of_rank(rank) if event.kind == "send"}
        for peer in sorted(peers):
            lanes.append(Lane(rank, peer, top, LANE_IN["wire"]))
            top += LANE_IN["wire"] + 0.02
        top += 0.11
    return lanes


def merged(events: Iterable[Event], gap_s: float) -> list[Event]:
    """Join neighbours closer than `gap_s`: chunks of one tensor, and what is too short to be told apart anyway."""
    out: list[Event] = []
    for event in sorted(events, key=lambda one: one.start_s):
        if out and event.start_s - out[-1].end_s <= gap_s and _look_the_same(out[-1], event, 2 * gap_s):
            out[-1] = out[-1]._replace(end_s=max(out[-1].end_s, event.end_s))
        else:
            out.append(event)
    return out


def _look_the_same(one: Event, other: Event, short_s: float) -> bool:
    is_alike = look_of(one) == look_of(other) and one.peer == other.peer
    return is_alike and (one.microbatch == other.microbatch or other.duration_s <= short_s)


def draw_timelines(timelines: Sequence[Timeline]) -> Figure:
    """Draw one panel per timeline (same workers in each), below each other, with one time axis."""
    lanes = make_lanes(timelines)
    panel_in = lanes[-1].top + lanes[-1].height
    top_in, gap_in, bottom_in = 0.26, 0.42, 0.34
    height_in = top_in + bottom_in + len(timelines) * (panel_in + gap_in)
    figure = Figure(figsize=(WIDTH_IN, height_in))
    span_s = max(timeline.span_s for timeline in timelines) or 1e-3
    for i, timeline in enumerate(timelines):
        bottom = height_in - top_in - (i + 1) * (panel_in + gap_in) + 0.06
        place = (LABEL_IN / WIDTH_IN, bottom / height_in, 1 - (LABEL_IN + 0.15) / WIDTH_IN, panel_in / height_in)
        axes = figure.add_axes(place)
        _draw_panel(axes, timeline, lanes, span_s)
        axes.tick_params(labelbottom=i == len(timelines) - 1, labelsize=8)
    _draw_legend(figure, timelines)
    return figure


def _draw_panel(axes: Axes, timeline: Timeline, lanes: Sequence[Lane], span_s: float) -> None:
    start_s = min((event.start_s for event in timeline.events), default=0.0)
    axes.set_xlim(0, span_s)
    axes.set_ylim(lanes[-1].top + lanes[-1].height, 0)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_time(seconds) if seconds else "0"))
    name = "predicted" if timeline.source == "predicted" else f"measured, step {timeline.step + 1}"
    axes.set_title(f"{name}: {format_time(timeline.span_s)}", loc="left", fontsize=9.5, fontweight="bold", pad=5)
    for lane in lanes:
        _draw_label(axes, timeline.workers, lane)
        _draw_lane(axes, timeline, lane, start_s, span_s)


def _draw_label(axes: Axes, workers: Sequence[str], lane: Lane) -> None:
    text, size, color = (workers[lane.rank], 8.5, INK) if lane.peer is None else (f"→ {lane.peer}", 6.5, MUTED)
    axes.annotate(
        _shortened(text, 18 if lane.peer is None else 24),
        (0, lane.top + lane.height / 2),
        (-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=size,
        color=color,
        annotation_clip=False,
    )
    axes.axhline(lane.top + lane.height, color=RULE, linewidth=0.4, zorder=0)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _draw_lane(axes: Axes, timeline: Timeline, lane: Lane, start_s: float, span_s: float) -> None:
    events = merged(_events_of(timeline, lane), span_s / 1500)
    events = [event._replace(start_s=event.start_s - start_s, end_s=event.end_s - start_s) for event in events]
    for order, (key, look) in enumerate(LOOKS.items()):
        boxes = [event for event in events if look_of(event) == key]
        if boxes:
            axes.add_patch(_patch(boxes, lane, look, order + 2))
            _write_inside(axes, boxes, lane, key, span_s)


def _events_of(timeline: Timeline, lane: Lane) -> Iterator[Event]:
    for event in timeline.of_rank(lane.rank):
        if (event.peer if event.kind == "send" else None) == lane.peer:
            yield event


def _patch(events: Sequence[Event], lane: Lane, look: Look, order: int) -> PathPatch:
    """Return one patch with a rectangle for each event."""
    top = lane.top + look.offset * lane.height
    bottom = top + look.height * lane.height
    corners: list[tuple[float, float]] = []
    for event in events:
        start, end = event.start_s, event.end_s
        corners += [(start, top), (end, top), (end, bottom), (start, bottom), (start, top)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(events)
    style = {"facecolor": look.color, "edgecolor": look.edge, "linewidth": 0 if look.hatch else 0.5}
    return PathPatch(Path(corners, codes), hatch=look.hatch, zorder=order, **style)


def _write_inside(axes: Axes, events: Sequence[Event], lane: Lane, key: str, span_s: float) -> None:
    """Write the microbatch into forwards and backwards and the peer into waits, where there is room."""
    if key not in ("forward", "backward", "weights", "wait", "reduce"):
        return
    points_per_s = (WIDTH_IN - LABEL_IN) * UNITS_PER_IN / span_s
    color = {"backward": "white", "weights": "white", "wait": MUTED}.get(key, INK)
    for event in events:
        text = event.peer if key in ("wait", "reduce") else str(event.microbatch)
        if text and event.duration_s * points_per_s > 4.6 * len(text) + 3:
            middle = ((event.start_s + event.end_s) / 2, lane.top + lane.height / 2)
            halo = {"facecolor": LOOKS[key].color, "edgecolor": "none", "pad": 0.6} if LOOKS[key].hatch else None
            axes.text(*middle, text, ha="center", va="center", fontsize=7, color=color, zorder=20, bbox=halo)


def _draw_legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    present = {look_of(event) for timeline in timelines for event in timeline.events}
    patches = [
        Patch(facecolor=look.color, edgecolor=look.edge, hatch=look.hatch, linewidth=0, label=look.label)
        for key, look in LOOKS.items()
        if key in present
    ]
    place = (LABEL_IN / WIDTH_IN, 1.0)
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=place,
        ncols=len(patches),
        fontsize=8,
        columnspacing=1.3,
        borderaxespad=0.3,
    )
