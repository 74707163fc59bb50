"""A file of equal slots, read and written past the page cache, so that memory use is what the budget says.

A file that is read through the page cache costs as much memory as it is long, and in a memory-limited container that
memory is the job's own. So the file is opened with O_DIRECT: the disk reads and writes the entries' memory itself,
which must be aligned for that. File systems that don't have it (older tmpfs, some network ones) go through the cache,
and each slot is flushed and dropped from it at once (posix_fadvise).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

ALIGNMENT = 4096
"""Bytes. Chosen: the greatest block size that disks and file systems commonly ask of direct I/O."""

Memory = NDArray[np.uint8]
"""One slot's memory: `slot_bytes` long and aligned to ALIGNMENT."""


def slot_bytes(entry_bytes: int) -> int:
    """Return what an entry takes in a tier: its bytes, rounded up to the alignment."""
    return -(-entry_bytes // ALIGNMENT) * ALIGNMENT


def checksum(memory: Memory, entry_bytes: int) -> int:
    return xxhash.xxh3_64_intdigest(memory[:entry_bytes].data)


class SlotFile:
    """Slots of `slot_bytes(entry_bytes)` in one file. Different slots may be used by different threads at once."""

    def __init__(self, path: Path, entry_bytes: int, *, is_read_only: bool = False) -> None:
        """Open the file, made if it isn't there; raise OSError where that can't be done."""
        self.path = path
        self._entry_bytes, self.slot_bytes = entry_bytes, slot_bytes(entry_bytes)
        flags = os.O_CLOEXEC | (os.O_RDONLY if is_read_only else os.O_RDWR | os.O_CREAT)
        self._handle, self.is_direct = _open(path, flags)

    def write(self, slot: int, memory: Memory) -> int:
        """Write a slot; return the checksum of the entry in it."""
        self._transfer(os.pwritev, slot, memory)
        if not self.is_direct:
            os.fdatasync(self._handle)
            self._drop_cached(slot)
        return checksum(memory, self._entry_bytes)

    def read(self, slot: int, memory: Memory, expected: int) -> bool:
        """Read a slot; say whether it was all there and has the expected checksum."""
        try:
            self._transfer(os.preadv, slot, memory)
        except OSError:
            return False
        if not self.is_direct:
            self._drop_cached(slot)
        return checksum(memory, self._entry_bytes) == expected

    def _transfer(self, move: Callable[[int, list[memoryview], int], int], slot: int, memory: Memory) -> None:
        done, at = 0, slot * self.slot_bytes
        while done < self.slot_bytes:
            moved = move(self._handle, [memory.data[done:]], at + done)
            if moved == 0:
                raise OSError(errno.EIO, "the file is too short", str(self.path))
            done += moved

    def _drop_cached(self, slot: int) -> None:
        os.posix_fadvise(self._handle, slot * self.slot_bytes, self.slot_bytes, os.POSIX_FADV_DONTNEED)

    def cut(self, num_slots: int) -> None:
        """Shorten the file to a number of slots, if it is longer."""
        if self.num_bytes > num_slots * self.slot_bytes:
            os.ftruncate(self._handle, num_slots * self.slot_bytes)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._handle).st_size

    def flush(self) -> None:
        """Return when all that was written is on the disk."""
        os.fdatasync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def _open(path: Path, flags: int) -> tuple[int, bool]:
    """Open for direct I/O, and try it; else for I/O through the page cache."""
    try:
        handle = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as caught:
        if caught.errno != errno.EINVAL:
            raise
    else:
        try:
            with mmap.mmap(-1, ALIGNMENT) as probe:
                os.preadv(handle, [probe], 0)
        except OSError:
            os.close(handle)
        else:
            return handle, True
    return os.open(path, flags, 0o644), False
