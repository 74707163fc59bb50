"""The report: one HTML file that holds everything and asks for nothing, so that it opens anywhere and for ever."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from wantrain.errors import ConfigError
from wantrain.fact import write_text
from wantrain.report import sections
from wantrain.report.css import CSS
from wantrain.report.headline import about, headline
from wantrain.report.perfetto import save_run_trace
from wantrain.report.read import RunData, read_run
from wantrain.run_directory import RunDirectory

FOOTNOTE = (
    "Latencies are one way. Sizes are decimal (1 MB = 10⁶ bytes)."
    " A step's figures are rank 0's where nothing else is said."
)

SECTIONS = (
    sections.learning,
    sections.one_step,
    sections.links,
    sections.codecs,
    sections.waiting,
    sections.network,
    sections.plan_grid,
    sections.config,
)


def render(data: RunData) -> str:
    """Return the whole page."""
    name = escape(data.name)
    body = "".join(section(data) for section in SECTIONS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · wantrain</title><style>{CSS}</style></head>
<body><main><header><p>wantrain · training report</p><h1>{name}</h1></header>
{headline(data)}{about(data)}{body}
<footer>{FOOTNOTE}</footer>
</main></body></html>
"""


def write_report(run: RunDirectory) -> Path:
    """Write report.html into the run directory from what the run has left so far, and return its path.

    Raises ConfigError where there is no run directory, or where a file in it is damaged.
    """
    write_text(run.report, render(read_run(run)))
    return run.report


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain report`."""
    run = RunDirectory(args.run)
    if args.trace is not None:
        save_run_trace(run, read_run(run).workers, args.trace, args.step)
        print(args.trace)
        return 0
    if args.step is not None:
        raise ConfigError("--step chooses a step for --trace; give both")
    print(write_report(run))
    return 0
