from __future__ import annotations

import pytest

from wantrain.report import html
from wantrain.report.html import Cell, Tile

NASTY = "<script>alert('x')</script>"


@pytest.mark.parametrize(
    "page",
    [
        html.section(NASTY, "", NASTY),
        html.absent(NASTY, NASTY),
        html.figure("", NASTY),
        html.tiles([Tile(NASTY, NASTY, NASTY)]),
        html.facts([(NASTY, NASTY)]),
        html.table([NASTY], [[NASTY]]),
    ],
)
def test_what_comes_from_a_run_is_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_long_table_is_folded_and_loses_no_row():
    table = html.table(["n"], [[f"row {i}"] for i in range(40)], shown=10)
    assert table.count("<td") == 40
    assert "<summary>30 more rows</summary>" in table


def test_a_bar_never_leaves_its_cell():
    assert "width:100.0%" in html.table(["a"], [[Cell("too much", share=1.7)]])


def test_a_figure_that_is_off_is_marked_as_such():
    assert "class='number off'" in html.table(["a", "b"], [["x", Cell("-20 %", is_off=True)]])
