"""Facts: files that can't be read or written are one line, and a file is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from wantrain.errors import ConfigError, PlanError
from wantrain.fact import append_line, read_json, read_toml, unwritable, write_text


def test_text_comes_back_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file"]


def test_a_folder_in_the_files_place_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match=r"can't write .*/taken \(is a directory\); choose another place"):
        write_text(tmp_path / "taken", "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_line_that_cannot_be_added_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't write .* \(no such file or directory\)"):
        append_line(tmp_path / "none" / "file", "line")


def test_a_full_disk_has_its_own_remedy() -> None:
    said = str(unwritable(Path("f"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert said == "can't write f (no space left on device); free some space"


def test_what_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text("[1]")
    with pytest.raises(PlanError, match=r"is not a JSON object \(got list\)"):
        read_json(path, PlanError)
    path.write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        read_json(path, PlanError)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_toml(path, ConfigError)
