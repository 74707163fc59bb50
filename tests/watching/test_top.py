"""The command: one frame, JSON, a picture, and a live view in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.watched import PATIENCE_S, Watched
from wantrain.cli import main
from wantrain.plan import Plan


def test_once_prints_a_frame_and_json_a_line(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Plan.load(watched.run.plan).workers
    assert main(["top", str(watched.run.path), "--once"]) == 0
    said = capsys.readouterr().out
    assert f"{first} → {second}" in said
    assert "longest wait: " in said
    assert main(["top", str(watched.run.path), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()  # it has ended: there is nothing to wait for
    frame = json.loads(line)
    assert frame["state"] == "stopped"
    assert frame["loss"] == watched.run.read_steps(0)[-1].loss
    assert {row["worker"] for row in frame["workers"]} == {first, second}
    assert {link["source"] for link in frame["links"]} == {first, second}


def test_in_a_terminal_it_shows_an_ended_run_and_ends(watched: Watched) -> None:
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "wantrain", "top", str(watched.run.path)]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := _read(ours):
            shown += piece
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "longest wait" in shown.decode()
    assert b"\x1b[" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # what Linux says of a terminal that its last program has left
        return b""


def test_a_picture_is_written_and_bad_input_is_one_line(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "top.svg"
    assert main(["top", str(watched.run.path), "--picture", str(picture)]) == 0
    assert picture.read_text().startswith("<svg")
    assert main(["top", str(watched.run.path), "--picture", "top.png"]) == 2
    assert main(["top", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
