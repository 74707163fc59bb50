import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from wantrain.codecs import buffer_file
from wantrain.codecs.buffer_arena import Arena
from wantrain.codecs.buffer_file import Memory, SlotFile, slot_bytes


def memories(*fills: int) -> list[Memory]:
    arena = Arena(len(fills), 5000, torch.device("cpu"))
    for slot, fill in enumerate(fills):
        arena.memory(slot)[:] = fill
    return [arena.memory(slot) for slot in range(len(fills))]


@pytest.fixture(params=["direct", "cached"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlotFile]:
    if request.param == "cached":
        monkeypatch.setattr(os, "O_DIRECT", 0)
        monkeypatch.setattr(buffer_file, "_open", lambda path, flags: (os.open(path, flags, 0o644), False))
    with closing(SlotFile(tmp_path / "f", 5000)) as opened:
        yield opened


def test_slots_come_back(file: SlotFile) -> None:
    one, two, back = memories(1, 2, 0)
    first, second = file.write(0, one), file.write(7, two)
    assert file.read(7, back, second)
    assert np.array_equal(back, two)
    assert file.read(0, back, first)
    assert np.array_equal(back, one)
    assert file.num_bytes == 8 * slot_bytes(5000)


def test_a_wrong_checksum_a_hole_and_what_lies_behind_the_end_are_not_whole(file: SlotFile) -> None:
    one, back = memories(1, 0)
    found = file.write(3, one)
    assert not file.read(3, back, found + 1)
    assert not file.read(1, back, found)
    assert not file.read(4, back, found)


def test_what_lies_behind_an_entry_in_its_slot_is_not_checked(file: SlotFile) -> None:
    one, back = memories(1, 0)
    found = file.write(0, one)
    one[5000:] = 9
    assert file.write(0, one) == found
    assert file.read(0, back, found)


def test_the_file_is_cut_to_the_budget_never_made_longer(file: SlotFile) -> None:
    (one,) = memories(1)
    file.write(3, one)
    file.cut(9)
    assert file.num_bytes == 4 * slot_bytes(5000)
    file.cut(2)
    assert file.num_bytes == 2 * slot_bytes(5000)


def test_a_file_that_is_only_read_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SlotFile(tmp_path / "none", 5000, is_read_only=True)


def test_without_direct_io_the_page_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: int, parts: list[object], at: int) -> int:
        raise OSError(22, os.strerror(22))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refused)
        opened = SlotFile(tmp_path / "f", 5000)
    with closing(opened):
        assert not opened.is_direct
        one, back = memories(1, 0)
        assert opened.read(0, back, opened.write(0, one))
