import os
import random
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codecs.buffers import ENTRY_BYTES, SLOT, Visitor, buffer_with, content, digest_of, steps_of
from wantrain.codecs.buffer_file import SlotFile
from wantrain.codecs.message_buffer import Known, LostEntryError, MessageBuffer
from wantrain.errors import CodecError, ConfigError


def put(buffer: MessageBuffer, *samples: int) -> None:
    for sample in samples:
        data = content(sample, 1, 0)
        buffer.new(sample).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        buffer.done(sample, 1, digest_of(data))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("ram", "file"), [(2, 0), (8, 0), (40, 0), (3, 40), (8, 40), (8, 10), (1, 40), (1, 3)])
def test_what_is_known_is_what_is_taken_and_no_budget_is_exceeded(ram: int, file: int, tmp_path: Path) -> None:
    with closing(buffer_with(ram, file, tmp_path)) as buffer:
        visitor = Visitor(buffer)
        for samples, ahead in steps_of(num_samples=30, batch_size=3, num_steps=60):
            visitor.visit(samples, ahead)
            taken = buffer.num_bytes
            assert taken.ram <= ram * SLOT
            assert taken.file <= file * SLOT
            assert len(buffer) <= ram + file


def test_with_room_for_all_each_sample_comes_as_a_first_visit_once(tmp_path: Path) -> None:
    with closing(buffer_with(6, 30, tmp_path)) as buffer:
        visitor = Visitor(buffer)
        for samples, ahead in steps_of(num_samples=30, batch_size=3, num_steps=50):
            visitor.visit(samples, ahead)
        assert sorted(visitor.first_visits) == list(range(30))
        assert buffer.stats.num_forgotten == 0


def test_with_memory_for_a_quarter_a_quarter_is_found_there() -> None:
    with closing(buffer_with(30)) as buffer:
        visitor = Visitor(buffer)
        for samples, ahead in steps_of(num_samples=120, batch_size=3, num_steps=40 * 10):
            visitor.visit(samples, ahead)
        assert 1 - (len(visitor.first_visits) - 120) / (120 * 9) == pytest.approx(0.25, abs=0.03)


def test_memory_in_use_stays_within_the_budget_however_long_the_file(tmp_path: Path) -> None:
    entry_bytes, num_entries = 1 << 20, 16
    with closing(
        MessageBuffer(1, entry_bytes, ram_bytes=num_entries << 20, folder=tmp_path, file_bytes=1 << 27)
    ) as buffer:
        before = resident_bytes()
        for samples, _ in steps_of(num_samples=128, batch_size=4, num_steps=64):
            for sample, held in zip(samples, buffer.known(samples), strict=True):
                (buffer.new(sample) if held is None else buffer.take(sample)).fill_(sample)
                buffer.done(sample, 1, 0)
        assert len(buffer) == 128
        assert resident_bytes() - before < (num_entries + 4) << 20
        assert buffer.num_bytes.file <= 1 << 27


class Chaos:
    """Random visits between re-announcements, withdrawals, and damage to the file."""

    def __init__(self, buffer: MessageBuffer, num_samples: int, seed: int) -> None:
        self.buffer, self.visitor = buffer, Visitor(buffer)
        self.num_samples, self.random = num_samples, random.Random(seed)

    def some(self) -> list[int]:
        return self.random.sample(range(self.num_samples), self.random.randint(0, min(5, self.num_samples)))

    def act(self, folder: Path) -> None:
        chance = self.random.random()
        if chance < 0.6:
            self.visitor.visit(self.some(), self.some())
        elif chance < 0.7:
            self.buffer.announce(self.some())
        elif chance < 0.8:
            self.ask_twice()
        elif chance < 0.9:
            self.buffer.forget(self.some())
        else:
            self.damage(folder)

    def ask_twice(self) -> None:
        samples = self.some()
        assert self.buffer.known(samples) == self.buffer.known(samples)
        self.buffer.forget(samples)

    def damage(self, folder: Path) -> None:
        for path in folder.glob("*.slots"):
            size = path.stat().st_size
            if self.random.random() < 0.2:
                os.truncate(path, size // 2)
            elif size:
                with path.open("r+b") as file:
                    at = self.random.randrange(size)
                    file.seek(at)
                    file.write(self.random.randbytes(min(SLOT, size - at)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 30), st.integers(1, 25), st.integers(0, 10**6))
def test_whatever_happens_what_is_known_is_what_is_taken(ram: int, file: int, num_samples: int, seed: int) -> None:
    notes: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        buffer = stack.enter_context(closing(buffer_with(ram, file, folder, on_problem=notes.append)))
        chaos = Chaos(buffer, num_samples, seed)
        for _ in range(60):
            chaos.act(folder)
            assert sum(path.stat().st_size for path in folder.iterdir()) <= file * SLOT
        assert len(notes) <= 1
        assert bool(notes) == bool(buffer.stats.num_damaged)


def test_a_damaged_entry_is_forgotten_before_it_is_known_and_said_once(tmp_path: Path) -> None:
    notes: list[str] = []
    with closing(buffer_with(2, 8, tmp_path, on_problem=notes.append)) as buffer:
        put(buffer, 1, 2, 3, 4, 5, 6)
        buffer.known([5, 6])  # so 1 to 4 have left memory
        buffer.known([7, 8])
        buffer.forget([5, 6, 7, 8])
        path = next(tmp_path.iterdir())
        path.write_bytes(bytes(path.stat().st_size))
        assert buffer.known([1, 2]) == [None, None]
        assert buffer.stats.num_damaged == 2
        with pytest.raises(LostEntryError, match="doesn't hold sample 1"):
            buffer.take(1)
    assert len(notes) == 1
    assert "is damaged or missing in buffer-0004-sender-0.slots; it and any other such is sent anew" in notes[0]


def test_what_is_announced_is_in_memory_when_it_is_asked_for(tmp_path: Path) -> None:
    with closing(buffer_with(4, 12, tmp_path)) as buffer:
        put(buffer, *range(8))
        for samples in ([0, 1, 2], [3, 4, 5], [6, 7, 0]):
            buffer.announce(samples)
            assert buffer.known(samples) == [Known(1, digest_of(content(sample, 1, 0))) for sample in samples]
            waited_s = buffer.stats.waited_s
            assert [bytes(buffer.take(sample).numpy()) for sample in samples] == [content(s, 1, 0) for s in samples]
            assert buffer.stats.waited_s == waited_s
            for sample in samples:
                buffer.done(sample, 1, digest_of(content(sample, 1, 0)))


def test_what_was_asked_for_stays_whatever_is_announced_next() -> None:
    with closing(buffer_with(4)) as buffer:
        put(buffer, 1, 2, 3, 4)
        assert buffer.known([1, 2]) == [Known(1, digest_of(content(sample, 1, 0))) for sample in (1, 2)]
        buffer.announce([5, 6, 7, 8])
        put(buffer, 5, 6)
        assert bytes(buffer.take(1).numpy()) == content(1, 1, 0)
        assert bytes(buffer.take(2).numpy()) == content(2, 1, 0)


def test_a_sample_that_comes_twice_is_known_once() -> None:
    with closing(buffer_with(4)) as buffer:
        put(buffer, 1)
        assert [held is None for held in buffer.known([1, 2, 1])] == [False, True, True]


def test_a_sample_in_use_is_not_known() -> None:
    with closing(buffer_with(4)) as buffer:
        put(buffer, 1)
        buffer.take(1)
        assert buffer.known([1]) == [None]
        assert len(buffer) == 0


def test_more_samples_than_memory_holds_are_first_visits_not_errors(tmp_path: Path) -> None:
    with closing(buffer_with(2, 12, tmp_path)) as buffer:
        visitor = Visitor(buffer)
        assert visitor.visit([1, 2, 3, 4]) == [None] * 4
        assert [held is None for held in visitor.visit([1, 2, 3, 4])] == [False, False, True, True]


def test_using_more_at_once_than_memory_holds_says_what_to_raise() -> None:
    with closing(buffer_with(2)) as buffer:
        buffer.new(1)
        buffer.new(2)
        with pytest.raises(CodecError, match=r"is all in use \(2 entries, asked for one more\); raise buffers.ram"):
            buffer.new(3)


def test_a_full_disk_costs_first_visits_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, parts: list[memoryview], at: int) -> int:
        raise OSError(28, os.strerror(28))

    notes: list[str] = []
    monkeypatch.setattr(os, "pwritev", full)
    with closing(buffer_with(3, 40, tmp_path, on_problem=notes.append)) as buffer:
        visitor = Visitor(buffer)
        for samples, ahead in steps_of(num_samples=9, batch_size=2, num_steps=20):
            visitor.visit(samples, ahead)
        assert buffer.stats.num_forgotten > 0
    assert notes == ["can't write buffer-0004-sender-0.slots (No space left on device); what has no room is sent anew"]


def test_an_error_in_a_thread_of_the_buffer_reaches_the_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SlotFile, slot: int, memory: object) -> int:
        raise RuntimeError("broken")

    monkeypatch.setattr(SlotFile, "write", broken)
    with closing(buffer_with(2, 8, tmp_path)) as buffer:
        put(buffer, 1, 2)
        with pytest.raises(CodecError, match=r"mover \d failed \(RuntimeError\('broken'\)\)"):
            put(buffer, 3, 4)


@pytest.mark.parametrize("tier", ["ram_bytes", "file_bytes", "device_bytes"])
def test_a_budget_that_holds_no_entry_is_refused(tier: str, tmp_path: Path) -> None:
    budget: dict[str, Any] = {"ram_bytes": SLOT, tier: 4999}
    with pytest.raises(ConfigError, match=rf"buffers.{tier.removesuffix('_bytes')} is too little .* \(got 5 kB"):
        MessageBuffer(4, ENTRY_BYTES, folder=tmp_path, **budget)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    with pytest.raises(ConfigError, match=r"can't open .*slots \(.*\); check the folder"):
        buffer_with(2, 2, tmp_path / "here")


def test_a_lower_budget_shortens_an_earlier_file(tmp_path: Path) -> None:
    with closing(buffer_with(2, 20, tmp_path)) as buffer:
        put(buffer, *range(12))
        assert buffer.known([0, 1]) != [None, None]
        assert buffer.num_bytes.file > 5 * SLOT
    with closing(buffer_with(2, 5, tmp_path)) as buffer:
        assert buffer.num_bytes.file == 5 * SLOT


@pytest.mark.parametrize("file", [0, 40])
def test_entries_on_a_device_are_the_same(file: int, tmp_path: Path) -> None:
    with closing(buffer_with(8, file, tmp_path, device_bytes=3 * ENTRY_BYTES)) as buffer:
        visitor = Visitor(buffer)
        for samples, ahead in steps_of(num_samples=20, batch_size=3, num_steps=40):
            visitor.visit(samples, ahead)
        assert buffer.num_bytes.device == 3 * ENTRY_BYTES
        assert len(visitor.first_visits) < 120
