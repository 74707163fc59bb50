"""Where each entry of a message buffer is, and how entries move between memory and file.

    announced samples without memory  ──► read them into free slots
    more of them than free slots      ──► write who was used last, and free its slot
    fewer slots that are free, or could be at once, than a step needs  ──► write who was used last, ahead of need

Two threads of the buffer's own do that, whenever something has changed; everything is decided under one lock, and the
disk is used outside of it. An entry is moved by one thread at a time, and never while the codec holds it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from wantrain.codecs.buffer_arena import Arena
from wantrain.codecs.buffer_device import DeviceTier, no_wait
from wantrain.codecs.buffer_file import Memory, SlotFile
from wantrain.codecs.buffer_queue import UseQueue
from wantrain.codecs.buffer_space import FileSpace
from wantrain.errors import CodecError

NUM_MOVERS = 2
"""Threads. Chosen: one reads while another writes; both wait for the same disk."""


@dataclass
class BufferStats:
    """What a buffer has done so far."""

    bytes_read: int = 0
    bytes_written: int = 0
    num_forgotten: int = 0
    """Entries that had no room in either tier."""
    num_damaged: int = 0
    waited_s: float = 0.0
    """How long the codec waited for the file."""


@dataclass(slots=True, eq=False)
class Entry:
    """One sample's entry."""

    sequence: int = 0
    digest: int | Tensor = 0
    checksum: int = 0
    """Of the bytes at `home`."""
    ram: int | None = None
    home: int | None = None
    """Its place in the file; it may not have been written there yet."""
    is_held: bool = False
    """The codec is changing it."""
    is_changed: bool = False
    """Memory is newer than `home`."""
    is_reading: bool = False
    is_writing: bool = False
    arrive: Callable[[], None] = no_wait
    """Waits until what the device holds is in memory, and the digest, which was made before, is there."""

    @property
    def is_busy(self) -> bool:
        return self.is_reading or self.is_writing

    def digest_now(self) -> int:
        """Return the digest, once a device has made it: whoever asks may be on another stream than its kernel."""
        self.arrive()
        return int(self.digest)


class Tiers:
    """The entries, their memory and their file. Methods are called with `changed` held, but for those that say so."""

    def __init__(
        self,
        key: str,
        arena: Arena,
        space: FileSpace,
        file: SlotFile | None,
        device: DeviceTier | None,
        on_problem: Callable[[str], None],
    ) -> None:
        self.key, self.arena, self.space, self.file, self.device = key, arena, space, file, device
        self.entries: dict[int, Entry] = {}
        """By sample, the one used last at the end."""
        self.homeless: dict[int, None] = {}
        """Those without a place in the file, the one used last at the end."""
        self._movable: OrderedDict[int, None] = OrderedDict()
        """Those in memory that have a place in the file, the one used last at the end."""
        self.queue = UseQueue(arena.num_slots)
        self.stats = BufferStats()
        self.changed = threading.Condition()
        self._on_problem = on_problem
        self._num_leaving = 0
        self._num_next = 0
        self._failure: CodecError | None = None
        self._is_closed = False
        names = [f"{key} mover {i}" for i in range(NUM_MOVERS if file is not None else 0)]
        self._movers = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for mover in self._movers:
            mover.start()

    def close(self) -> None:
        """End the threads, close the file and let go of the memory. Not under the lock."""
        with self.changed:
            self._is_closed = True
            self.changed.notify_all()
        for mover in self._movers:
            mover.join()
        if self.file is not None:
            self.file.close()
        self.arena.close()

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; raise the error that ended a mover."""
        if not is_so():
            start_s = time.monotonic()
            self.changed.wait_for(lambda: self._failure is not None or is_so())
            self.stats.waited_s += time.monotonic() - start_s
        if self._failure is not None:
            raise self._failure

    def expect(self, sample_ids: Sequence[int]) -> None:
        """Note what the next step needs, and that as many slots are to be had for the one after it."""
        self._num_next = len(sample_ids)
        self.queue.put_first(sample_ids)
        self.window_changed()

    def is_checked(self, sample: int) -> bool:
        """Say whether nothing is to be waited for: the entry is in memory, or there is none."""
        entry = self.entries.get(sample)
        return entry is None or entry.is_held or (entry.ram is not None and not entry.is_reading)

    def is_idle(self, sample: int) -> bool:
        entry = self.entries.get(sample)
        return entry is None or not entry.is_busy

    def memory(self, entry: Entry) -> Memory:
        assert entry.ram is not None
        return self.arena.memory(entry.ram)

    def promise(self, sample: int) -> None:
        """Give a sample a right to memory; raise CodecError where all of it is promised."""
        if not self.queue.promise(sample):
            raise CodecError(
                f"the memory of {self.key} is all in use ({self.arena.num_slots} entries, asked for one more); "
                "raise buffers.ram"
            )
        self.window_changed()

    def reserve(self, sample: int) -> Entry:
        """Return a sample's entry, held, with memory that is to be written anew."""
        self.promise(sample)
        self.wait(lambda: self.is_idle(sample))
        entry = self.entries.setdefault(sample, Entry())
        self.hold(sample, entry)
        self.window_changed()
        if entry.ram is None:
            self.wait(lambda: bool(self.arena.free))
            entry.ram = self.arena.free.pop()
        return entry

    def hold(self, sample: int, entry: Entry) -> None:
        """Leave an entry to the codec."""
        entry.is_held = True
        self._movable.pop(sample, None)
        self.homeless.pop(sample, None)

    def settle(self, sample: int, sequence: int, digest: int | Tensor, has_home: bool = True) -> None:
        """Put a held entry in its place, as the one used last."""
        entry = self.entries[sample] = self.entries.pop(sample)
        entry.sequence, entry.digest = sequence, digest
        entry.is_held, entry.is_changed = False, True
        entry.home = self.space.move(entry.home) if has_home else None
        (self.homeless if entry.home is None else self._movable)[sample] = None
        self.queue.used(sample)
        self.window_changed()

    def window_changed(self) -> None:
        """Forget what has no place in the file and stands in the way of entries that have a right to memory, the last
        used first; let the movers look."""
        window = self.queue.window
        num_outside = len(self.homeless) - sum(sample in self.homeless for sample in window)
        excess = num_outside + sum(sample in self.entries for sample in window) - self.arena.num_slots
        if excess > 0:
            outside = [sample for sample in self.homeless if sample not in window]
            for sample in outside[-excess:]:
                self.drop(sample)
                self.stats.num_forgotten += 1
        self.changed.notify_all()

    def drop(self, sample: int) -> None:
        """Forget an entry that no thread moves."""
        entry = self.entries.pop(sample)
        self._movable.pop(sample, None)
        self.homeless.pop(sample, None)
        if entry.home is not None:
            self.space.release(entry.home)
        if self.device is not None:
            self.device.forget(sample)
        if entry.ram is not None:
            self._free_memory(entry)

    def _free_memory(self, entry: Entry) -> None:
        assert entry.ram is not None
        entry.arrive()
        self.arena.free.append(entry.ram)
        entry.ram = None
        self.changed.notify_all()

    def _work(self) -> None:
        try:
            while (move := self._await_move()) is not None:
                move()
        except Exception as caught:  # noqa: BLE001  the thread's edge: whoever waits must hear of it
            with self.changed:
                self._failure = CodecError(f"{threading.current_thread().name} failed ({caught!r}); report it")
                self.changed.notify_all()

    def _await_move(self) -> Callable[[], None] | None:
        with self.changed:
            while not self._is_closed:
                if (move := self._next_move()) is not None:
                    return move
                self.changed.wait()
        return None

    def _next_move(self) -> Callable[[], None] | None:
        """Return what to do next, in the order of the drawing on top; None if there is nothing."""
        lacking = [sample for sample in self.queue.window if not self._has_memory(sample)]
        for sample in lacking if self.arena.free else ():
            entry = self.entries.get(sample)
            if entry is not None and not entry.is_held:
                entry.ram, entry.is_reading = self.arena.free.pop(), True
                return partial(self._read, sample, entry)
        while len(lacking) > len(self.arena.free) + self._num_leaving:
            last = next((sample for sample in self._leaving_order() if not self.entries[sample].is_busy), None)
            if last is None:
                return None
            entry = self.entries[last]
            if entry.is_changed:
                self._num_leaving += 1
                entry.is_writing = True
                return partial(self._write_out, last, entry, leaves=True)
            del self._movable[last]
            self._free_memory(entry)
        for sample in islice(self._leaving_order(), max(0, self._num_next - len(self.arena.free))):
            entry = self.entries[sample]
            if entry.is_changed and not entry.is_busy:
                entry.is_writing = True
                return partial(self._write_out, sample, entry, leaves=False)
        return None

    def _has_memory(self, sample: int) -> bool:
        entry = self.entries.get(sample)
        return entry is not None and entry.ram is not None

    def _leaving_order(self) -> Iterator[int]:
        """Yield those whose memory may be had once they are not busy, the first to go first."""
        return (sample for sample in reversed(self._movable) if sample not in self.queue.window)

    def _read(self, sample: int, entry: Entry) -> None:
        assert self.file is not None
        assert entry.home is not None
        is_whole = self.file.read(entry.home, self.memory(entry), entry.checksum)
        with self.changed:
            entry.is_reading = False
            self.stats.bytes_read += self.file.slot_bytes
            if is_whole:
                self._movable[sample] = None
                self._movable.move_to_end(sample, last=False)
            else:
                self.drop(sample)
                self._note_damage(sample)
            self.changed.notify_all()

    def _note_damage(self, sample: int) -> None:
        self.stats.num_damaged += 1
        if self.stats.num_damaged == 1:
            self._on_problem(
                f"sample {sample} is damaged or missing in {self.key}.slots; it and any other such is sent anew"
            )

    def _write_out(self, sample: int, entry: Entry, leaves: bool) -> None:
        problem = None
        try:
            self._write(entry)
        except OSError as caught:
            problem = caught
        with self.changed:
            self._num_leaving -= leaves
            entry.is_writing = False
            if problem is not None:
                self._lose_home(sample, entry, problem)
            elif leaves and sample not in self.queue.window:
                del self._movable[sample]
                self._free_memory(entry)
            self.changed.notify_all()

    def _write(self, entry: Entry) -> None:
        """Write an entry to its place. Not under the lock."""
        assert self.file is not None
        assert entry.home is not None
        entry.arrive()
        entry.checksum = self.file.write(entry.home, self.memory(entry))
        entry.is_changed = False
        self.stats.bytes_written += self.file.slot_bytes

    def _lose_home(self, sample: int, entry: Entry, problem: OSError) -> None:
        """Forget an entry that can't be written; keep it if it has been announced meanwhile."""
        if not self.stats.num_forgotten:
            self._on_problem(f"can't write {self.key}.slots ({problem.strerror}); what has no room is sent anew")
        self.stats.num_forgotten += 1
        if sample not in self.queue.window:
            self.drop(sample)
            return
        assert entry.home is not None
        self.space.release(entry.home)
        entry.home = None
        del self._movable[sample]
        self.homeless[sample] = None

    def write_changed(self) -> None:
        """Write every entry that is newer than its place in the file, and flush; raise OSError. Not under the lock."""
        with self.changed:
            samples = [sample for sample, entry in self.entries.items() if entry.is_changed and entry.home is not None]
        for sample in samples:
            self._write_if_changed(sample)
        if self.file is not None:
            self.file.flush()

    def _write_if_changed(self, sample: int) -> None:
        with self.changed:
            self.wait(lambda: self.is_idle(sample))
            entry = self.entries.get(sample)
            if entry is None or entry.home is None or not entry.is_changed:
                return
            entry.is_writing = True
        try:
            self._write(entry)
        finally:
            with self.changed:
                entry.is_writing = False
                self.changed.notify_all()

    def write_homeless(self, path: Path, entry_bytes: int) -> dict[int, int]:
        """Write the entries without a place in the file to one at `path`; return their places in it. Raise OSError."""
        places = {sample: place for place, sample in enumerate(self.homeless)}
        if places:
            path.unlink(missing_ok=True)
            with closing(SlotFile(path, entry_bytes)) as file:
                for sample, place in places.items():
                    entry = self.entries[sample]
                    entry.arrive()
                    entry.checksum = file.write(place, self.memory(entry))
                    self.stats.bytes_written += file.slot_bytes
                file.flush()
        return places
