"""What every benchmark shares: where it ran, medians with spread, and where results are kept."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from wantrain.errors import WantrainError

_HERE = Path(__file__).resolve().parent

RESULTS = _HERE / "results" if (_HERE.parent / "pyproject.toml").exists() else Path("benchmarks")
"""In a checkout beside the programs; for an installed wheel, below the folder in which one is."""


def environment() -> dict[str, Any]:
    """Return machine, versions and commit, as they stand beside every figure."""
    return {"when": datetime.now(UTC).isoformat(timespec="seconds")} | _machine()


@functools.cache
def _machine() -> dict[str, Any]:
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(_HERE), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "-C", str(_HERE), "status", "--porcelain", "--", "../wantrain"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = done.stdout.strip() or os.environ.get("WANTRAIN_COMMIT", "unknown")  # a copy without .git is told
    return commit + ("+" if changed.stdout.strip() else "")


class ProcessorTime(NamedTuple):
    """Since boot, in ticks of all processors: what went to other machines, what nobody wanted, and all there was."""

    stolen: int
    idle: int
    total: int

    @classmethod
    def now(cls) -> ProcessorTime:
        """Read the kernel's count; where PROC_STAT names a file, a guest's host's that is copied there."""
        text = Path(os.environ.get("PROC_STAT", "/proc/stat")).read_text(encoding="ascii")
        ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]  # the last two are in the first two already
        return cls(ticks[7] if len(ticks) > 7 else 0, sum(ticks[3:5]), sum(ticks))

    def stolen_since(self, before: ProcessorTime) -> float:
        """Return the share of the time since then that went to other machines."""
        return (self.stolen - before.stolen) / max(1, self.total - before.total)

    def busy_since(self, before: ProcessorTime) -> float:
        """Return the share of the time since then that was not idle; where it nears 1, the machine was the limit."""
        total = self.total - before.total
        return 1 - (self.idle - before.idle) / total if total else 0.0


def tied(argv: Sequence[str]) -> list[str]:
    """Return the command that ends with this program, however this ends."""
    return ["setpriv", "--pdeathsig", "KILL", *argv]


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a benchmark's main program and exit; what it can't do is said in one line, with the error's status."""
    program = Path(sys.argv[0]).stem
    try:
        sys.exit(main() or 0)
    except WantrainError as caught:
        print(f"{program}: {caught}", file=sys.stderr)
        sys.exit(caught.exit_status)
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; results that are kept, are kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def text_of(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Return an option's type: text that `parse` takes, or several parted by commas, as it stands."""

    def checked(text: str) -> str:
        try:
            for one in filter(None, text.split(",")):
                parse(one)
        except ValueError as caught:
            raise argparse.ArgumentTypeError(str(caught)) from None
        return text

    return checked


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of some measurements, the least and the greatest, and all of them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": [round(value, 4) for value in values],
    }


def append_result(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Add a record to a result file, one JSON line each; nothing that was measured is overwritten.

    It is on the disk when this returns. Half a line that a killed program left goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(record | {"environment": environment()}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return path


def read_results(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the records of a result file, oldest first; none where there is no file, nor of half a line at its end."""
    path = folder / f"{name}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
