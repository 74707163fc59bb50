"""`wantrain top`: a run in the terminal, while it goes on or after it has ended."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from wantrain.errors import ConfigError
from wantrain.fact import write_text
from wantrain.run_directory import RunDirectory
from wantrain.watching.frame import Frame, RunWatcher
from wantrain.watching.view import picture, render


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain top`: until the run has ended, or once where that is asked or where there is no terminal."""
    if args.picture is not None and Path(args.picture).suffix != ".svg":
        raise ConfigError(f"a picture is a file that ends in .svg (got '{args.picture}')")
    watcher, console = RunWatcher(RunDirectory(args.run)), Console()
    frame = watcher.look()
    if args.picture is not None:
        write_text(args.picture, picture(frame))
        return 0
    try:
        if args.json:
            _print_lines(watcher, frame, args.once, args.every)
        elif args.once or not console.is_terminal:
            console.print(render(frame))
        else:
            _show(watcher, frame, console, args.every)
    except KeyboardInterrupt:
        pass  # how one leaves it
    return 0


def _print_lines(watcher: RunWatcher, frame: Frame, is_once: bool, every_s: float) -> None:
    """Print a frame as a JSON line, and go on until the run has ended."""
    while True:
        print(json.dumps(figures(frame)), flush=True)
        if is_once or frame.has_ended:
            return
        time.sleep(every_s)
        frame = watcher.look()


def _show(watcher: RunWatcher, frame: Frame, console: Console, every_s: float) -> None:
    with Live(render(frame), console=console, auto_refresh=False) as live:
        while not frame.has_ended:
            time.sleep(every_s)
            frame = watcher.look()
            live.update(render(frame), refresh=True)


def figures(frame: Frame) -> dict[str, object]:
    """Return a frame as plain data, without the curve of all losses."""
    data = dataclasses.asdict(frame)
    del data["losses"]
    return data | {"links": [link._asdict() for link in frame.links], "longest_wait": frame.longest_wait}
