import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.codecs.buffers import ENTRY_BYTES, SLOT
from wantrain.codecs.buffer_arena import Arena
from wantrain.codecs.buffer_file import Memory, SlotFile
from wantrain.codecs.buffer_space import FileSpace
from wantrain.codecs.buffer_tiers import Tiers


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    """Four entries in memory, twelve in the file."""
    arena, file = Arena(4, ENTRY_BYTES, torch.device("cpu")), SlotFile(tmp_path / "f", ENTRY_BYTES)
    with closing(Tiers("buffer", arena, FileSpace(12), file, None, print)) as made:
        yield made


def put(tiers: Tiers, *samples: int) -> None:
    for sample in samples:
        with tiers.changed:
            tiers.memory(tiers.reserve(sample))[:] = sample
            tiers.settle(sample, 1, 0)


def becomes(tiers: Tiers, is_so: Callable[[], bool]) -> bool:
    with tiers.changed:
        return tiers.changed.wait_for(is_so, timeout=20)


def in_memory(tiers: Tiers) -> set[int]:
    return {sample for sample, entry in tiers.entries.items() if entry.ram is not None}


def test_the_one_used_last_leaves_memory(tiers: Tiers) -> None:
    put(tiers, 1, 2, 3, 4)
    with tiers.changed:
        tiers.expect([8, 9])
    assert becomes(tiers, lambda: len(tiers.arena.free) == 2)
    assert in_memory(tiers) == {1, 2}


def test_what_is_announced_stays_and_comes_back(tiers: Tiers) -> None:
    put(tiers, 1, 2, 3, 4)
    with tiers.changed:
        tiers.expect([4, 8, 9])
    assert becomes(tiers, lambda: len(tiers.arena.free) == 2)
    assert in_memory(tiers) == {1, 4}
    with tiers.changed:
        tiers.expect([3, 2, 1, 4])
    assert becomes(tiers, lambda: all(tiers.is_checked(sample) for sample in (1, 2, 3, 4)))
    for sample in (1, 2, 3, 4):
        assert set(tiers.memory(tiers.entries[sample]).tolist()) == {sample}


def test_as_much_as_a_step_needs_is_written_ahead_and_no_more(tiers: Tiers) -> None:
    with tiers.changed:
        tiers.expect([1, 2])
    put(tiers, 1, 2, 3, 4)
    assert becomes(tiers, lambda: not tiers.entries[4].is_changed and not tiers.entries[3].is_changed)
    assert in_memory(tiers) == {1, 2, 3, 4}
    written = tiers.stats.bytes_written
    with tiers.changed:
        tiers.expect([8, 9])
    assert becomes(tiers, lambda: len(tiers.arena.free) == 2)
    assert tiers.stats.bytes_written == written


def test_an_entry_that_is_asked_for_while_it_is_written_stays(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    write = SlotFile.write

    def slow(self: SlotFile, slot: int, memory: Memory) -> int:
        begun.set()
        assert may_end.wait(20)
        return write(self, slot, memory)

    monkeypatch.setattr(SlotFile, "write", slow)
    put(tiers, 1, 2, 3, 4)
    with tiers.changed:
        tiers.expect([9])
    assert begun.wait(20)
    with tiers.changed:
        tiers.expect([4])
    may_end.set()
    assert becomes(tiers, lambda: tiers.is_idle(4) and len(tiers.arena.free) == 1)
    assert 4 in in_memory(tiers)
    assert not tiers.entries[4].is_changed


def test_a_save_writes_each_changed_entry_once(tiers: Tiers) -> None:
    put(tiers, 1, 2, 3)
    tiers.write_changed()
    tiers.write_changed()
    assert tiers.stats.bytes_written == 3 * SLOT


def test_entries_without_a_home_are_written_elsewhere_in_order_of_last_use(tmp_path: Path) -> None:
    arena = Arena(4, ENTRY_BYTES, torch.device("cpu"))
    with closing(Tiers("buffer", arena, FileSpace(0), None, None, print)) as tiers:
        put(tiers, 3, 1, 2)
        assert tiers.write_homeless(tmp_path / "beside", ENTRY_BYTES) == {3: 0, 1: 1, 2: 2}
        put(tiers, 3)
        assert tiers.write_homeless(tmp_path / "beside", ENTRY_BYTES) == {1: 0, 2: 1, 3: 2}
    assert (tmp_path / "beside").read_bytes()[::SLOT] == bytes([1, 2, 3])
