"""Write the README's result table from the measured records, so that no figure in it is typed by hand.

    python benchmarks/readme_table.py            write it
    python benchmarks/readme_table.py --check    status 1 where it differs from what would be written

The newest record of each setting counts; the older ones stay in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_convergence import table as convergence_table
from harness import RESULTS, read_results

ROOT = Path(__file__).resolve().parent.parent

Record = dict[str, Any]

BEGIN, END = "<!-- results: written by benchmarks/readme_table.py -->\n", "<!-- end of results -->\n"

NOTHING = "No results have been recorded yet.\n"


def newest(records: list[Record], key: Callable[[Record], object]) -> list[Record]:
    """Return the last record of each setting, in the order in which settings first came up."""
    return list({key(record): record for record in records}.values())


def overlap_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of seconds a step, wantrain's beside torch's own pipelines."""
    last = newest(records, lambda one: (one["uplink"], *_codecs(one), one["stages"]))
    systems = list(dict.fromkeys(name for record in last for name in record["systems"]))
    yield "Seconds a step (median), GPT-2 XL shapes; compute and network emulated:\n"
    yield _row(["uplink", "activations", "their gradients", "stages × microbatches", "dilation", "bound", *systems])
    yield _row(["---"] * (6 + len(systems)))
    for record in last:
        medians = [f"{record['systems'][name]['median']:.2f}" if name in record["systems"] else "" for name in systems]
        shape = f"{record['stages']} × {record['microbatches']}"
        first = [record["uplink"], *_codecs(record), shape, f"{record['dilation']:g}", f"{record['bound_s']:.2f}"]
        yield _row([*first, *medians])
    yield f"\n`python benchmarks/bench_overlap.py` prints it{_where(last[-1])}.\n"


def _codecs(record: Record) -> tuple[str, str]:
    """Return what carried activations and their gradients; records from before there were codecs are raw."""
    codecs = record.get("codecs", {"forward": "raw:fp32", "backward": "raw:fp32"})
    return codecs["forward"], codecs["backward"]


def link_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of what a channel carries over a link, beside a single connection."""
    last = newest(records, lambda one: (one["topology"], one["bytes"], one["count"], one["dilation"]))
    yield "Mbit/s of payload over one link (median):\n"
    yield _row(["topology", "payloads", "in a row", "a single one", "connections", "one connection, in a row"])
    yield _row(["---"] * 6)
    for record in last:
        channel, alone = record["channel"], record["one_connection"]
        yield _row(
            [
                Path(record["topology"]).stem,
                f"{record['count']} × {record['bytes'] / 1e6:g} MB",
                f"{channel['row_mbit_per_s']['median']:.0f}",
                f"{channel['single_mbit_per_s']['median']:.0f}",
                str(channel["transport"]["num_connections"]),
                f"{alone['row_mbit_per_s']['median']:.0f}",
            ]
        )
    command = "wantrain emulate benchmarks/long_link.toml -- python benchmarks/bench_links.py"
    yield f"\n`{command}` prints it{_where(last[-1])}.\n"


def convergence_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of held-out losses with each codec; only the newest experiment's runs."""
    last = [one for one in records if one["experiment"] == records[-1]["experiment"]]
    seeds = len({one["seed"] for one in last})
    experiment = last[-1]["experiment"]
    yield (
        f"Held-out loss after fine-tuning a small GPT for {last[-1]['epochs']:g} epochs on {experiment['text']},"
        f" {seeds} seeds; lower is better:\n"
    )
    yield convergence_table(last)
    yield f"\n`python benchmarks/bench_convergence.py --data FILE` prints it{_where(last[-1])}.\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _where(record: Record) -> str:
    machine = record["environment"]
    return (
        f" (here: {machine['cores']} cores, {machine['processor']}, torch {machine['torch']}, {machine['when'][:10]})"
    )


def table(folder: Path = RESULTS) -> str:
    """Return everything between the markers."""
    parts = []
    for name, rows in (("overlap", overlap_rows), ("links", link_rows), ("convergence", convergence_rows)):
        records = read_results(name, folder)
        if records:
            parts.append("\n".join(rows(records)))
    return "\n".join(parts) or NOTHING


def with_table(text: str, results: str) -> str:
    """Return the README with what is between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the README lacks a marker; put {BEGIN.strip()} and {END.strip()} back")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where the table is out of date")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = with_table(text, table())
    if args.check:
        return int(text != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
