from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser

import pytest

from wantrain.errors import ConfigError
from wantrain.report.page import SECTIONS, run, write_report
from wantrain.run_directory import RunDirectory

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balance(HTMLParser):
    """Notes the first end tag that doesn't fit the last open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.mistake = ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistake = self.mistake or f"{tag} at {self.getpos()}"


def page_of(run: RunDirectory) -> str:
    return write_report(run).read_text(encoding="utf-8")


def check_balanced(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert (parser.mistake, parser.open) == ("", [])


def test_a_whole_run_gives_one_light_page_with_every_section(finished_run):
    page = page_of(finished_run)
    check_balanced(page)
    assert finished_run.report.stat().st_size < 1_000_000
    assert page.count("<section") == len(SECTIONS)
    assert page.count("<svg") == 5
    assert "class='absent'" not in page


def test_the_page_asks_for_nothing_from_outside(finished_run):
    page = page_of(finished_run)
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b", page)
    assert not re.search(r"@import|url\((?!#)|\bsrc=", page)
    references = re.findall(r'href="([^"]*)"', page)
    assert references
    assert all(reference.startswith("#") for reference in references)


def test_a_run_that_has_just_begun_gives_a_page_of_honest_lines(tmp_path, plan):
    run = RunDirectory(tmp_path / "young")
    plan.save(run.plan)
    page = page_of(run)
    check_balanced(page)
    for words in (
        "No step has been finished yet",
        "No timeline has been recorded yet",
        "Nothing was sent",
        "not emulated",
    ):
        assert words in page
    assert "<svg" not in page


def test_a_resumed_run_is_one_curve(finished_run, write_more_steps):
    write_more_steps(range(50, 70), shift_s=7200.0)
    page = page_of(finished_run)
    check_balanced(page)
    assert "dotted: resumed" in page


def test_a_missing_run_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no run directory"):
        write_report(RunDirectory(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()


def test_writing_the_report_again_replaces_it(finished_run):
    assert page_of(finished_run) == page_of(finished_run)


def test_the_command_prints_where_the_page_is(finished_run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argparse.Namespace(run=str(finished_run.path), trace=None, step=None)) == 0
    assert capsys.readouterr().out == f"{finished_run.report}\n"
    assert finished_run.report.exists()
