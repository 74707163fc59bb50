"""AQ-SGD's message buffer: what was last sent of each sample, kept in memory and in a file, each under a byte budget.

    codec thread        known ── take ── done           new ── done            an entry is `entry_bytes` of uint8
                          │        ▲       │ is final
    memory    [ x  x  x  x  x  x  x  x  x  x ]           in use, announced, or kept for the next epoch
                 ▲ read and checked      │ written when its memory is needed, or when a checkpoint is
    file      [ x  x  x  x  x  x  x  x  x  x  x  x ]     copy on write (buffer_space)

**Order of use.** `announce` says what comes; threads of the buffer's own read and check it ahead of need. `known` waits
for what it is asked about, so what it says is what `take` gives: an entry that is damaged is forgotten before the two
ends agree on what they hold, never after.

**Who leaves memory.** An epoch uses every sample once, in a random order. What has been used in this epoch comes back
in the next; what has not comes before all of that. So the entry just used is among those used again latest, and is the
one to go. (LRU would keep it: with a fourth of the entries in memory it finds (1/4)²/2 = 3 % of them there; this finds
a fourth, the most that is possible without looking an epoch ahead.) The same holds for who is forgotten.

**Who is forgotten.** An entry is given its place in the file when it is final, not when it is written. Where there is
none it stays in memory, and the last used of such entries are forgotten when announced samples need that memory. So
what is held follows from the calls and the checkpoints alone, never from how fast the disk is: a repeated run, and one
that goes on from a checkpoint, sends the same samples as first visits.

Source: Wang et al., "Fine-tuning Language Models over Slow Networks using Activation Compression with Guarantees",
NeurIPS 2022, section 3; their code keeps all of it in one temporary file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wantrain.codecs.buffer_arena import Arena
from wantrain.codecs.buffer_device import DeviceTier
from wantrain.codecs.buffer_file import SlotFile, slot_bytes
from wantrain.codecs.buffer_index import BufferIndex, Record, buffer_key
from wantrain.codecs.buffer_space import FileSpace
from wantrain.codecs.buffer_tiers import BufferStats, Entry, Tiers
from wantrain.errors import CheckpointError, CodecError, ConfigError
from wantrain.units import format_bytes


class LostEntryError(CodecError):
    """An entry was taken that the buffer doesn't hold, without asking `known` first."""


class Known(NamedTuple):
    """What a buffer holds of a sample: how often it was sent, and the digest of its entry."""

    sequence: int
    digest: int


class TierBytes(NamedTuple):
    """What a buffer takes, by tier."""

    device: int
    ram: int
    file: int


def print_problem(text: str) -> None:
    print(f"wantrain: {text}", file=sys.stderr, flush=True)


class MessageBuffer:
    """The entries of one side of one boundary on one rank. One thread uses it; between steps another may save it."""

    def __init__(
        self,
        layer: int,
        entry_bytes: int,
        *,
        ram_bytes: int,
        folder: Path | None = None,
        file_bytes: int = 0,
        device: torch.device | str = "cpu",
        device_bytes: int = 0,
        name: str = "sender-0",
        on_problem: Callable[[str], None] = print_problem,
    ) -> None:
        """`layer` is the first one after the boundary; it and `name` (side and replica) are what checkpoints know the
        buffer by, and unique in `folder`. Without a folder, or file_bytes, there is no file.

        Entries are handed out on `device`, where copies of as many as `device_bytes` hold stay between their uses; the
        host memory of a GPU's is pinned.
        `on_problem` is told in one line, in any thread, of a file that is damaged or full. Raise ConfigError where a
        budget holds no entry, or the file can't be opened.
        """
        self.layer, self.name, self.entry_bytes = layer, name, entry_bytes
        ram_slots = _num_entries("ram", ram_bytes, slot_bytes(entry_bytes))
        file_slots = _num_entries("file", file_bytes, slot_bytes(entry_bytes)) if folder and file_bytes else 0
        place, tier = torch.device(device), None
        if device_bytes or place.type != "cpu":
            num_kept = _num_entries("device", device_bytes, entry_bytes) if device_bytes else 0
            tier = DeviceTier(place, entry_bytes, num_kept)
        self._tiers = Tiers(
            self.key,
            Arena(ram_slots, entry_bytes, place),
            FileSpace(file_slots),
            _open(folder / f"{self.key}.slots", entry_bytes, file_slots) if folder and file_slots else None,
            tier,
            on_problem,
        )

    @property
    def key(self) -> str:
        """What the buffer's files are called."""
        return buffer_key(self.layer, self.name)

    @property
    def stats(self) -> BufferStats:
        return self._tiers.stats

    @property
    def num_bytes(self) -> TierBytes:
        """What is allocated, in use or not."""
        device, file = self._tiers.device, self._tiers.file
        return TierBytes(
            device.num_bytes if device is not None else 0,
            self._tiers.arena.num_bytes,
            file.num_bytes if file is not None else 0,
        )

    @property
    def reads_past_the_page_cache(self) -> bool:
        """Whether there is a file, on a file system with direct I/O."""
        return self._tiers.file is not None and self._tiers.file.is_direct

    def __len__(self) -> int:
        with self._tiers.changed:
            return sum(not entry.is_held for entry in self._tiers.entries.values())

    # What the codec calls.

    def announce(self, sample_ids: Iterable[int]) -> None:
        """Say which samples come next, in order of use, after those that `known` was asked about and that were not used
        yet. It replaces what was announced before."""
        with self._tiers.changed:
            self._tiers.queue.replace(sample_ids)
            self._tiers.window_changed()

    def known(self, sample_ids: Sequence[int]) -> list[Known | None]:
        """Return what the buffer holds of the samples that come next, read and checked; wait for that where need be.

        Until its next use each of them has memory, and what is held of it stays. Not known is a sample that there is no
        memory for, one that is in use, and one that comes a second time: its entry will have changed.
        """
        tiers = self._tiers
        with tiers.changed:
            tiers.expect(sample_ids)
            asked = [sample for sample in sample_ids if sample in tiers.queue.window]
            for sample in asked:
                tiers.promise(sample)
            tiers.wait(lambda: all(tiers.is_checked(sample) for sample in asked))
            found = {sample: _known(tiers.entries.get(sample)) for sample in asked}
            return [found.pop(sample, None) for sample in sample_ids]

    def take(self, sample_id: int) -> Tensor:
        """Return a sample's entry, uint8 [entry_bytes], to be changed in place until `done`; wait where need be.

        Raise LostEntryError where the buffer doesn't hold it; never for what `known` has said.
        """
        tiers = self._tiers
        with tiers.changed:
            tiers.promise(sample_id)
            tiers.wait(lambda: tiers.is_checked(sample_id) and tiers.is_idle(sample_id))
            entry = tiers.entries.get(sample_id)
            if entry is None:
                tiers.queue.withdraw(sample_id)
            if entry is None or entry.is_held:
                raise LostEntryError(f"{self.key} doesn't hold sample {sample_id}; ask `known` before taking it")
            tiers.hold(sample_id, entry)
            return self._host(entry) if tiers.device is None else tiers.device.fetch(sample_id, self._host(entry))

    def new(self, sample_id: int) -> Tensor:
        """Return memory for a sample's first entry, or for another in place of the one it has, to be filled until
        `done`; what is in it is arbitrary."""
        tiers = self._tiers
        with tiers.changed:
            entry = tiers.reserve(sample_id)
            return self._host(entry) if tiers.device is None else tiers.device.reserve(sample_id)

    def done(self, sample_id: int, sequence: int, digest: int | Tensor) -> None:
        """Note that an entry taken or made is final. A digest on a device is fetched when it is asked for."""
        tiers = self._tiers
        with tiers.changed:
            entry = tiers.entries[sample_id]
            if tiers.device is not None:
                entry.arrive = tiers.device.store(sample_id, self._host(entry))
            tiers.settle(sample_id, sequence, digest)

    def forget(self, sample_ids: Iterable[int]) -> None:
        """Drop the entries of samples, where there are any."""
        tiers = self._tiers
        with tiers.changed:
            for sample in sample_ids:
                tiers.wait(lambda sample=sample: tiers.is_idle(sample))  # type: ignore[misc]
                tiers.queue.withdraw(sample)
                if sample in tiers.entries:
                    tiers.drop(sample)
            tiers.window_changed()

    def close(self) -> None:
        """End the buffer's threads and close its file; what was not saved is lost."""
        self._tiers.close()

    def _host(self, entry: Entry) -> Tensor:
        assert entry.ram is not None
        return self._tiers.arena.entry(entry.ram)

    # What a checkpoint calls, between steps.

    def save(self, folder: Path, step: int, plan: str) -> BufferIndex:
        """Write what has changed since it was last written, and return the index of everything; the slots that it
        names are left as they are while the checkpoint of `step` is the newest, and longer where there is room.

        Entries without a place in the file are written to one of their own in `folder`: at every save, all of them.
        Raise CheckpointError where the disk is full or fails.
        """
        tiers = self._tiers
        try:
            tiers.write_changed()
            with tiers.changed:
                beside = tiers.write_homeless(folder / f"{self.key}.entries", self.entry_bytes)
                tiers.space.claim(step)
                records = [_record(sample, entry, beside) for sample, entry in tiers.entries.items()]
        except OSError as caught:
            raise CheckpointError(f"can't save {self.key} ({caught.strerror}); free some space") from None
        return BufferIndex.of(self.layer, self.name, plan, self.entry_bytes, records)

    def keep_claims(self, steps: Sequence[int]) -> None:
        """Let go of the slots of checkpoints other than those of `steps`."""
        with self._tiers.changed:
            self._tiers.space.keep_claims(steps)

    def claim(self, step: int, index: BufferIndex) -> None:
        """Leave the slots that a checkpoint of this buffer names as they are; for all that are kept, before loading."""
        if index.entry_bytes == self.entry_bytes:
            with self._tiers.changed:
                self._tiers.space.claim(step, (place for place in index.places if place >= 0))

    def adopt(self, record: Record) -> bool:
        """Hold the entry in a claimed slot of the buffer's own file; say whether that is possible."""
        tiers = self._tiers
        with tiers.changed:
            if record.sample in tiers.entries or not tiers.space.settle(record.place):
                return False
            tiers.entries[record.sample] = Entry(record.sequence, record.digest, record.checksum, home=record.place)
        return True

    def copy(self, record: Record, source: SlotFile, slot: int, *, has_home: bool) -> bool:
        """Hold a copy of an entry in another file; say whether it was whole. `has_home`: give it a place in the
        buffer's own, if there is one."""
        tiers = self._tiers
        with tiers.changed:
            entry = tiers.reserve(record.sample)
        is_whole = source.read(slot, tiers.memory(entry), record.checksum)
        with tiers.changed:
            if is_whole:
                tiers.settle(record.sample, record.sequence, record.digest, has_home)
            else:
                tiers.queue.used(record.sample)
                tiers.drop(record.sample)
        return is_whole


def _known(entry: Entry | None) -> Known | None:
    return None if entry is None or entry.is_held else Known(entry.sequence, entry.digest_now())


def _record(sample: int, entry: Entry, beside: dict[int, int]) -> Record:
    place = -1 - beside[sample] if entry.home is None else entry.home
    return Record(sample, entry.sequence, entry.digest_now(), entry.checksum, place)


def _num_entries(tier: str, budget_bytes: int, entry_bytes: int) -> int:
    if budget_bytes < entry_bytes:
        raise ConfigError(
            f"buffers.{tier} is too little for an entry of a message buffer (got {format_bytes(budget_bytes)} for "
            f"this one, expected at least {format_bytes(entry_bytes)}); raise it"
        )
    return budget_bytes // entry_bytes


def _open(path: Path, entry_bytes: int, num_slots: int) -> SlotFile:
    """Open a buffer's file, and cut off what an earlier run with a larger budget left beyond this one's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = SlotFile(path, entry_bytes)
        file.cut(num_slots)
    except OSError as caught:
        raise ConfigError(f"can't open {path} ({caught.strerror}); check the folder") from None
    return file
