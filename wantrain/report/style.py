"""The house style of every figure: colours, type and line weights, and how a figure becomes inline SVG.

Colours are Okabe and Ito's ("Color Universal Design", 2008): distinct under the common colour-blindnesses. Where two
meet in a figure they also differ in lightness or hatching, so that a black-and-white print keeps them apart.

Text stays text (`svg.fonttype` none) and takes the page's own font, so a figure needs no font file and can be searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1b1f24"
MUTED = "#5b6570"
RULE = "#d9dde1"
BLUE = "#0072B2"
SKY = "#56B4E9"
NAVY = "#003D66"
"""A shade of BLUE, told from it by lightness."""
GREEN = "#009E73"
ORANGE = "#E69F00"
RED = "#D55E00"
PURPLE = "#CC79A7"

RC: Any = {  # the type of its keys differs from one matplotlib to the next
    "svg.fonttype": "none",
    "svg.hashsalt": "wantrain",  # ids that don't change from run to run
    "font.family": "DejaVu Sans",  # comes with matplotlib: measures text the same everywhere, wider than what is shown
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.4,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style inside the `with` block; matplotlib's own settings come back after it."""
    with matplotlib.rc_context(RC):
        yield


def small_figure() -> tuple[Figure, Axes]:
    """Return a figure that is readable three to a desktop's width and one to a phone's."""
    figure = Figure(figsize=(4.9, 3.1), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, label: str) -> str:
    """Return a figure as an inline <svg> that fills its container; `label` is what a screen reader says."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<g id="[^"]*"', "<g", svg
    )  # ids repeat from figure to figure; only clips and markers are referred to
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(\d+\.\d\d)\d+", r"\1", svg)  # a hundredth of a pixel is enough
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
