"""Write docs/results.md and the README's part of it from the measured records, so that no figure is typed by hand.

    python benchmarks/write_results.py            write both, and the pictures
    python benchmarks/write_results.py --check    status 1 where a table differs from what would be written

The newest record of each setting counts; the older ones stay in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from harness import RESULTS, read_results
from network_rows import most_work
from pictures import PICTURES, draw
from result_tables import SECTIONS, Record, network_rows

ROOT = Path(__file__).resolve().parent.parent

BEGIN, END = "<!-- results: written by benchmarks/write_results.py -->\n", "<!-- end of results -->\n"

NOTHING = "No results have been recorded yet.\n"

INTRO = (
    "As measured, from `benchmarks/results/`; `python benchmarks/write_results.py` writes this page. Compute and"
    " network are emulated where a table says so. Figures are only compared within one run on one machine, except that"
    " the networks' table may hold rows of several, which it names.\n"
)


IN_README = ("network", "data_parallel", "hooks", "time_to_loss", "planning", "links", "convergence")


def table(names: Iterable[str] = IN_README, folder: Path = RESULTS) -> str:
    """Return the tables of some result files, without titles: what stands between the README's markers.

    Of the networks only the headline is there.
    """
    headline = {"network": partial(network_rows, choose=most_work)}
    parts = [_section(name, folder, headline.get(name)) for name in names]
    return "\n".join(filter(None, parts)) or NOTHING


def _section(name: str, folder: Path, rows: Callable[[list[Record]], Iterator[str]] | None = None) -> str:
    records = read_results(name, folder)
    return "\n".join((rows or SECTIONS[name][1])(records)) if records else ""


def page(folder: Path = RESULTS) -> str:
    """Return docs/results.md."""
    parts = ["# Results\n\n" + INTRO]
    for name, (title, _) in SECTIONS.items():
        if rows := _section(name, folder):
            shown = [
                f"![{what}](pictures/{picture}.svg)\n\n"
                for picture, (of, what, drawn) in PICTURES.items()
                if of == name and drawn(folder) is not None
            ]
            parts.append(f"## {title}\n\n{''.join(shown)}{rows}")
    return "\n".join(parts)


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
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a table is out of date")
    args = parser.parse_args(argv)
    readme, results = ROOT / "README.md", ROOT / "docs" / "results.md"
    wanted = {readme: with_table(readme.read_text(encoding="utf-8"), table()), results: page()}
    if args.check:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in wanted.items()))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    draw(results.parent / "pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
