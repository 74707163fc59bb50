from __future__ import annotations

import re

import matplotlib

from wantrain.report.style import house_style, small_figure, to_svg


def svg_of_a_line() -> str:
    with house_style():
        figure, axes = small_figure()
        axes.plot([0, 1], [0, 1], marker="o", label="a line")
        axes.legend()
        return to_svg(figure, "a line")


def test_the_style_ends_with_its_block():
    before = matplotlib.rcParams["svg.fonttype"]
    with house_style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert matplotlib.rcParams["svg.fonttype"] == before


def test_svg_text_is_text_in_the_pages_own_font():
    svg = svg_of_a_line()
    assert ">a line</text>" in svg
    assert "font-family" not in svg


def test_svg_fills_its_container_and_says_what_it_is():
    head = svg_of_a_line().split(">")[0]
    assert head.startswith('<svg role="img" aria-label="a line"')
    assert "viewBox=" in head
    assert not re.search(r" (width|height)=", head)


def test_every_reference_inside_an_svg_has_its_target():
    svg = svg_of_a_line()
    wanted = set(re.findall(r'(?:href="#|url\(#)([\w]+)', svg))
    assert wanted
    assert wanted <= set(re.findall(r'id="([\w]+)"', svg))


def test_the_same_figure_gives_the_same_svg():
    assert svg_of_a_line() == svg_of_a_line()
