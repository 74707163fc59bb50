"""The few pieces of HTML that the report is made of; everything that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """A table cell: `share` (0 to 1) draws a bar under the number, `shade` (0 to 1) fills the cell."""

    text: str
    share: float | None = None
    shade: float | None = None
    is_off: bool = False


class Tile(NamedTuple):
    """A headline figure with what it is and what to hold it against."""

    label: str
    value: str
    note: str = ""


def section(title: str, body: str, intro: str = "") -> str:
    """Return a titled section; `intro` is plain text."""
    lead = f"<p class='intro'>{escape(intro)}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def absent(title: str, why: str) -> str:
    """Return the one honest line that stands for a section without data."""
    return f"<section class='absent'><h2>{escape(title)}</h2><p>{escape(why)}</p></section>"


def figure(svg: str, caption: str, css_class: str = "") -> str:
    """Return a figure with its caption; `svg` is trusted."""
    below = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure class='{css_class}'><div class='scroll'>{svg}</div>{below}</figure>"


def tiles(items: Iterable[Tile]) -> str:
    """Return the row of headline figures."""
    inner = (
        f"<div class='tile'><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd><p>{escape(tile.note)}</p></div>"
        for tile in items
    )
    return f"<dl class='tiles'>{''.join(inner)}</dl>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a definition list of names and values."""
    inner = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl class='facts'>{''.join(inner)}</dl>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell | str]], num_text: int = 1, shown: int = 24) -> str:
    """Return a table whose first `num_text` columns are text and the rest numbers; rows past `shown` are folded."""
    first = _table(head, rows[:shown], num_text)
    if len(rows) <= shown:
        return first
    rest = _table(head, rows[shown:], num_text)
    return f"{first}<details><summary>{len(rows) - shown} more rows</summary>{rest}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell | str]], num_text: int) -> str:
    heads = "".join(f"<th{_kind(i, num_text)}>{escape(text)}</th>" for i, text in enumerate(head))
    lines = "".join(f"<tr>{''.join(_cell(cell, i, num_text) for i, cell in enumerate(row))}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"


def _kind(column: int, num_text: int) -> str:
    return "" if column < num_text else " class='number'"


def _cell(cell: Cell | str, column: int, num_text: int) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    classes = [name for name, holds in (("number", column >= num_text), ("off", cell.is_off)) if holds]
    style = f" style='background:{_shade(cell.shade)}'" if cell.shade else ""
    bar = f"<i class='bar'><b style='width:{min(1.0, cell.share):.1%}'></b></i>" if cell.share is not None else ""
    return f"<td class='{' '.join(classes)}'{style}>{escape(cell.text)}{bar}</td>"


def _shade(share: float) -> str:
    return f"rgba(230,159,0,{0.75 * min(1.0, share):.2f})"
