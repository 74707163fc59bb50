"""A frame as text: the run, its loss, its workers and whom they wait for, its links.

demo  gpt_10m, 2 × 2 on two_sites                                                              running
step 42/300 ━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 14 %, 3:21 left
loss 2.134 ▇▅▄▃▃▂▂▁▁   held out 2.201   6,012 tokens/s   0.68 s a step

 worker      stage  replica  step  computing            waits for
 paris-0         0        0    41  ██████▌     66 %     tokyo-0 24 %, paris-1 3 %
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wantrain.report.read import LinkUse
from wantrain.report.tables import percent, plain_table
from wantrain.units import format_bandwidth, format_bytes, format_time
from wantrain.watching.frame import Frame, State, WorkerRow

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 10
_SPARK_CELLS = 24
_PICTURE_COLUMNS = 100
_MOST_LINKS = 16
"""Chosen: the busiest; a job of eight replicas has more than a screen holds."""

_STYLES: dict[State, str] = {
    "starting": "yellow",
    "running": "green",
    "silent": "bold red",
    "stopped": "yellow",
    "finished": "blue",
}
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def spark(values: Sequence[float], cells: int = _SPARK_CELLS) -> str:
    """Draw a curve in one line: each cell the mean of its share of the values, lowest ▁, highest █."""
    cells = min(cells, len(values))
    if not cells:
        return ""
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """Draw a share as a bar, to an eighth of a cell."""
    eighths = round(8 * cells * min(1.0, max(0.0, share)))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(cells)


def render(frame: Frame) -> RenderableType:
    """Return the whole frame."""
    parts: list[RenderableType] = [_title(frame), _progress(frame), _figures(frame)]
    if frame.workers:
        parts.append(_workers(frame.workers))
    if frame.longest_wait is not None:
        worker, peer, share = frame.longest_wait
        parts.append(Text(f"longest wait: {worker} for {peer}, {percent(share)} of its step", style="cyan"))
    if frame.links:
        parts.append(_links(frame.links))
    parts += [Text(note, style="yellow") for note in frame.notes]
    return Group(*parts)


def picture(frame: Frame) -> str:
    """Return the frame as an SVG picture that asks for nothing from elsewhere."""
    console = Console(record=True, width=_PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(render(frame))
    return _FONTS.sub("", console.export_svg(title=f"wantrain top {frame.name}"))


def _two_ends(left: Text, right: Text) -> Table:
    row = Table.grid(expand=True)
    row.add_column(ratio=1, no_wrap=True)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(left, right)
    return row


def _title(frame: Frame) -> Table:
    state = Text(frame.state, style=_STYLES[frame.state])
    if frame.state == "silent" and frame.age_s is not None:
        state.append(f" for {format_time(round(frame.age_s))}")
    return _two_ends(Text.assemble((frame.name, "bold"), "  ", frame.model), state)


def _progress(frame: Frame) -> RenderableType:
    if frame.num_steps is None:
        return Text(f"step {frame.steps_done}", style="bold")
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    share = percent(frame.steps_done / max(1, frame.num_steps))
    if frame.left_s and not frame.has_ended:
        share += f", {format_time(max(1, round(frame.left_s)))} left"
    line = ProgressBar(total=frame.num_steps, completed=frame.steps_done)
    row.add_row(Text(f"step {frame.steps_done}/{frame.num_steps}", style="bold"), line, Text(share))
    return row


def _figures(frame: Frame) -> Text:
    if frame.loss is None:
        return Text("waiting for the first step")
    parts = [f"loss {frame.loss:.3f} {spark(frame.losses)}"]
    parts += [f"held out {frame.validation_loss:.3f}"] if frame.validation_loss is not None else []
    parts += [f"{frame.tokens_per_s:,.0f} tokens/s"] if frame.tokens_per_s else []
    parts += [f"{format_time(frame.step_s)} a step"] if frame.step_s else []
    return Text("   ".join(parts), style="cyan", no_wrap=True)


def _workers(rows: Sequence[WorkerRow]) -> Table:
    table = plain_table("")
    table.title = None
    for heading in ("worker", "stage", "replica", "step", "computing", "", "waits for"):
        table.add_column(heading, justify="right" if heading in ("stage", "replica", "step", "") else "left")
    for row in rows:
        waits = ", ".join(f"{peer} {percent(share)}" for peer, share in row.waiting.items() if share >= 0.005)
        computing = (Text(bar(row.computing), style="green"), percent(row.computing))
        table.add_row(row.worker, str(row.stage), str(row.replica), str(row.step), *computing, waits or "–")
    return table


def _links(links: Sequence[LinkUse]) -> Table:
    table = plain_table("")
    table.title = None
    for heading in ("link", "a step", "uncompressed", "while sending", "busy", ""):
        table.add_column(heading, justify="left" if heading in ("link", "busy") else "right")
    for link in links[:_MOST_LINKS]:
        table.add_row(
            f"{link.source} → {link.target}",
            format_bytes(link.wire_bytes),
            format_bytes(link.raw_bytes),
            format_bandwidth(link.sending_bytes_per_s) if link.sending_bytes_per_s else "–",
            Text(bar(link.busy_share), style="magenta"),
            percent(link.busy_share),
        )
    if len(links) > _MOST_LINKS:
        table.caption = f"and {len(links) - _MOST_LINKS} less busy ones"
    return table
