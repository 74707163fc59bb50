"""What does my network cost, and what does compression buy back? Pipelines over a sweep of emulated networks.

A model's layers sleep for a V100's seconds on eight stages; payloads, schedules and the shaped network are real. Every
worker's uplink is shared by what it sends forwards and back. Systems of one setting take turns, step by step, on the
same standing network with the same dilation. Beside each stands the bound: a work-conserving schedule with everything
overlapped and unlimited memory, for that system's payloads.

    wantrain bench network --quick          two networks, four stages: under five minutes
    wantrain bench network                  10 Gbit/s to 100 Mbit/s, then latencies to 100 ms, all systems
    wantrain bench network --uplinks "500 Mbit/s" --systems "torch 1F1B,raw,aqsgd:3/quantized:6" --microbatches 32

Systems: torch 1F1B, torch GPipe, torch zero bubble, DeepSpeed; of wantrain raw, raw fp16, quantized, aqsgd, auto, or
any FORWARD/BACKWARD codecs, each also as "zero bubble aqsgd", which leaves gradients of weights for later; wantrain's
codecs inside another's, "torch 1F1B + aqsgd" or "DeepSpeed + aqsgd". Every step is kept when it ends: a sweep that was
killed goes on where it stopped, and steps that the results hold are not measured again (`--again` does). A page with
pictures, network.html, is written beside.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harness import RESULTS, ProcessorTime, append_result, read_results, tied
from network_rows import HEAD, NAME, Record, Row, cells, rows_of
from network_setting import AUTO, OWN, PEERS, Setting, System, parse_systems
from pipeline_turns import add_work_arguments
from wantrain.errors import ConfigError, RunError, WantrainError
from wantrain.probe.machine import free_memory_bytes
from wantrain.scheduler.cost_model import predict
from wantrain.units import format_time, parse_bytes_per_s, parse_time_s

UPLINKS = "10 Gbit/s,1 Gbit/s,500 Mbit/s,300 Mbit/s,100 Mbit/s"
LATENCIES = "1 ms,10 ms,30 ms,100 ms"
LATENCIES_AT = "500 Mbit/s"

QUICK: dict[str, Any] = {
    "uplinks": "10 Gbit/s,500 Mbit/s",
    "latencies": "",
    "stages": 4,
    "microbatches": 8,
    "systems": "torch 1F1B,raw,aqsgd",
    "repeats": 1,
}
"""What `--quick` asks for, where the user doesn't say otherwise."""

_WIDTH = 150
"""Columns that the table takes; a narrower terminal breaks its lines."""

_START_S = 12.0
"""Seconds until eight processes have imported torch, for the time left; from two cores."""

_PROCESS_BYTES = 0.4e9
"""Of a process with torch, before it holds a pipeline (seen)."""

_HELD_TIMES = 2
"""How many times a step's activations a system's pipelines hold (seen: six systems of 8 × 32 took 23 GB)."""


def default_dilation(uplink_bytes_per_s: float) -> float:
    """Return by how much a network of this speed is slowed for a machine of few cores."""
    return 8.0 if uplink_bytes_per_s > 2.5e8 else 4.0


def default_systems() -> list[str]:
    """Return all peers that are installed, wantrain's codecs, and two of these with the backward split."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    peers = [name for name in PEERS if name != "DeepSpeed" or has_deepspeed]
    return [*peers, *OWN, AUTO.forward, "zero bubble raw", "zero bubble aqsgd"]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Return the sweep: uplinks, then latencies at one of them."""
    base = Setting(1.0, 0.0, args.model, args.stages, args.microbatches)
    uplinks = [parse_bytes_per_s(one) for one in args.uplinks.split(",") if one]
    latencies = [parse_time_s(one) for one in args.latencies.split(",") if one]
    pairs = [(uplink, 0.0) for uplink in uplinks] + [(parse_bytes_per_s(LATENCIES_AT), one) for one in latencies]
    return [
        replace(base, uplink_bytes_per_s=uplink, latency_s=latency, dilation=args.dilation or default_dilation(uplink))
        for uplink, latency in pairs
    ]


def missing(rows: Sequence[Row], setting: Setting, system: System, repeats: int) -> int:
    """Return how many steps are still to be measured."""
    return max(0, repeats - sum(len(row.steps) for row in rows if (row.setting, row.system) == (setting, system)))


def expected_s(setting: Setting, system: System, steps: int) -> float:
    """Return about how long some steps take on the clock: twice the bound where sends hold up computing."""
    return steps * setting.dilation * setting.bound_s(system) * (1.05 if system.is_own else 2.0)


def measure(setting: Setting, systems: Sequence[System], args: argparse.Namespace, repeats: int) -> Iterator[Record]:
    """Let systems take turns inside an emulated network; yield each step as it ends, warm-up too.

    Raises RunError where a rank failed, with the last of its words.
    """
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder, "uplinks.toml")
        network.write_text(setting.topology_text(), encoding="utf-8")
        command = [
            sys.executable, "-m", "wantrain", "emulate", str(network), "--dilation", f"{setting.dilation:g}", "--",
            sys.executable, str(Path(__file__).with_name("pipeline_turns.py")),
            "--model", setting.model, "--stages", str(setting.stages), "--microbatches", str(setting.microbatches),
            "--uplink", f"{setting.uplink_bytes_per_s * 8!r} bit/s", "--latency", f"{setting.latency_s * 1e3!r} ms",
            "--dilation", repr(setting.dilation), "--warmups", str(args.warmups), "--repeats", str(repeats),
            "--systems", ";".join(system.name for system in systems),
        ]  # fmt: skip
        words: list[str] = []
        with subprocess.Popen(tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    words.append(line.rstrip())
                    _, found, said = line.partition('| {"system"')
                    if found:
                        yield json.loads('{"system"' + said)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise RunError(f"{setting.title}: {reason(words, process.returncode)}")


def reason(words: Sequence[str], status: int) -> str:
    """Return why a measurement ended, from what its ranks wrote and its exit status."""
    telling = [line for line in words if "Error" in line or "wantrain:" in line]
    if telling:
        return telling[-1]
    if abs(status) in (signal.SIGKILL, 128 + signal.SIGKILL):
        return "a rank was killed, most likely for want of memory; name fewer systems at once, or fewer microbatches"
    return f"ended with status {status}, and no rank said why"


def sweep(args: argparse.Namespace, systems: Sequence[System], console: Console, kept_in: str = NAME) -> None:
    """Measure what the results lack, and add it to those of that name, which may hold other records too."""
    settings, folder = settings_of(args), args.out
    there_already = [one for one in read_results(kept_in, folder) if one["benchmark"] == NAME]
    rows = [] if args.again else rows_of(there_already)
    series = {(row.setting, row.system): row.steps[-1]["series"] for row in rows}
    todo = [
        (setting, [(system, count) for system in systems if (count := missing(rows, setting, system, args.repeats))])
        for setting in settings
    ]
    todo = [(setting, lacking) for setting, lacking in todo if lacking]
    total = sum(_START_S + sum(expected_s(s, one, n + args.warmups) for one, n in lacking) for s, lacking in todo)
    wanted = len(settings) * len(systems) * args.repeats
    now = datetime.now(UTC).isoformat(timespec="seconds")
    there = wanted - sum(n for _, lacking in todo for _, n in lacking)
    console.print(f"{wanted} steps, {there} of them in {folder}; about {format_time(total)} to go")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for setting, lacking in todo:
            for record in _measure_setting(setting, dict(lacking), args):
                system = System.parse(record["system"])
                progress.update(
                    task, description=f"{setting.title}, {system.name}", advance=expected_s(setting, system, 1)
                )
                if record["turn"] >= 0:
                    own = {"series": series.get((setting, system), now)}
                    append_result(kept_in, own | record, folder)


def at_once(setting: Setting, systems: Sequence[System], free_bytes: float) -> list[Sequence[System]]:
    """Part systems into groups of about one size, each of which fits in memory."""
    room = 0.9 * free_bytes - setting.stages * _PROCESS_BYTES
    each = _HELD_TIMES * setting.stages * setting.microbatches * setting.payloads([("raw:fp32", "raw:fp32")])[0][0]
    num_groups = math.ceil(len(systems) / max(1, int(room / each)))
    return [systems[i * len(systems) // num_groups : (i + 1) * len(systems) // num_groups] for i in range(num_groups)]


def _measure_setting(setting: Setting, lacking: dict[System, int], args: argparse.Namespace) -> Iterator[Record]:
    """Yield each step of one setting as it ends; systems take turns with as many others as memory holds."""
    for group in at_once(setting, list(lacking), free_memory_bytes()):
        yield from _measure_together(setting, {system: lacking[system] for system in group}, args)


def _measure_together(setting: Setting, lacking: dict[System, int], args: argparse.Namespace) -> Iterator[Record]:
    """Yield each step as it ends; systems that lack more steps than others go on alone."""
    while lacking:
        repeats = min(lacking.values())
        predicted = {one.name: _predicted_s(setting, one) for one in lacking}
        codecs = {one.name: setting.codecs(one) for one in lacking}
        before = ProcessorTime.now()
        for record in measure(setting, list(lacking), args, repeats):
            now = ProcessorTime.now()
            yield {
                "benchmark": NAME,
                "setting": setting.as_dict(),
                "emulated": "compute and network",
                "bound_s": setting.bound_s(System.parse(record["system"]), codecs[record["system"]]),
                "codecs": codecs[record["system"]],
                "predicted_s": predicted[record["system"]],
                "stolen": round(now.stolen_since(before), 3),
            } | record
            before = now
        lacking = {system: n - repeats for system, n in lacking.items() if n > repeats}


def _predicted_s(setting: Setting, system: System) -> float | None:
    if not system.is_own:
        return None
    return predict(setting.plan(system), setting.topology(), setting.profile()).step_s


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print all rows of the settings that were asked for."""
    table = Table(box=None, header_style="bold")
    for name in HEAD:
        table.add_column(name, no_wrap=name != "system", justify="left" if name in HEAD[:2] else "right")
    for row in rows:
        table.add_row(*cells(rows, row))
    console.print(table)


def chosen(rows: Sequence[Row], settings: Sequence[Setting], systems: Sequence[System]) -> list[Row]:
    """Return the rows of a sweep, by setting, as its systems were named."""
    return [row for setting in settings for system in systems for row in rows
            if (row.setting, row.system) == (setting, system)]  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="two networks, four stages, one step each")
    parser.add_argument("--uplinks", default=UPLINKS, help="comma separated (default: %(default)s)")
    parser.add_argument("--latencies", default=LATENCIES, help=f"at {LATENCIES_AT} (default: %(default)s; '' for none)")
    parser.add_argument("--systems", default=",".join(default_systems()), help="comma separated (default: %(default)s)")
    parser.add_argument("--dilation", type=float, help="slow all down (default: 4, above 2 Gbit/s 8)")
    parser.add_argument("--again", action="store_true", help="measure anew what the results hold")
    parser.add_argument("--show", action="store_true", help="measure nothing: the table and the page of what is there")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with another sweep's results")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where results are kept")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    if args.dilation is not None and args.dilation < 1:
        parser.error("a dilation below 1 can't be emulated")
    if args.repeats < 1 or args.warmups < 1:
        parser.error("at least one step of each system must count, after at least one to warm up")
    return args


def main() -> int:
    args = parse_arguments()
    console = Console(width=max(_WIDTH, Console().width))
    try:
        systems = parse_systems(args.systems)
        settings = settings_of(args)
        if any(s.schedule == "DeepSpeed" for s in systems) and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("DeepSpeed isn't installed; pip install 'wantrain[deepspeed]', or leave it out")
        if args.against and not read_results(NAME, args.against):
            raise ConfigError(f"{args.against} holds no {NAME}.jsonl to compare with; give the folder of another sweep")
        if not args.show:
            sweep(args, systems, console)
    except (WantrainError, ValueError) as caught:
        print(f"wantrain bench network: {caught}", file=sys.stderr)
        return caught.exit_status if isinstance(caught, WantrainError) else 2
    except KeyboardInterrupt:
        print("\nwantrain bench network: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    rows = chosen(rows_of(read_results(NAME, args.out)), settings, systems)
    print_table(rows, console)
    if rows:
        from network_page import write_page

        console.print(f"pictures: {write_page(rows, args.out)}")
    if args.against:
        print_comparison(rows, chosen(rows_of(read_results(NAME, args.against)), settings, systems), console)
    return 0


def print_comparison(rows: Sequence[Row], others: Sequence[Row], console: Console) -> None:
    """Print each row's median beside another sweep's, and whether the two spreads meet."""
    table = Table("network", "system", "step s", "other", "change", "spreads meet", box=None, header_style="bold")
    for row in rows:
        for other in others:
            if (row.setting, row.system) == (other.setting, other.system):
                meet = min(row.seconds) <= max(other.seconds) and min(other.seconds) <= max(row.seconds)
                table.add_row(
                    row.setting.title, row.system.name, f"{row.step_s:.2f}", f"{other.step_s:.2f}",
                    f"{row.step_s / other.step_s - 1:+.1%}", "yes" if meet else "no",
                )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
