"""The message buffer's tier on the device: copies of the entries in use, and of as many more as its budget holds.

Memory of the host stays the truth. What is used is copied up, unless it is still there from its last use, and copied
down when it is final; both on the stream that is current for the calling thread, always the same one, so that they
follow the codec's kernels without a wait. Whoever then reads the host's bytes waits for the copy down with the function
that `store` returns. On the CPU, where the tests run it, a copy is done when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wantrain.errors import CodecError


def no_wait() -> None:
    """Wait for nothing."""


class DeviceTier:
    """Slots in device memory, or none (`num_entries` 0); not for use by two threads at once."""

    def __init__(self, device: torch.device, entry_bytes: int, num_entries: int) -> None:
        self._slots = torch.empty((num_entries, entry_bytes), dtype=torch.uint8, device=device)
        self._lent: dict[int, Tensor] = {}
        self._free = list(range(len(self._slots)))
        self._places: dict[int, int] = {}
        self._in_use: set[int] = set()

    @property
    def num_bytes(self) -> int:
        return self._slots.numel()

    def reserve(self, sample: int) -> Tensor:
        """Return a sample's device memory, to be written; it stays until `store` or `forget`."""
        if not len(self._slots):
            return self._lent.setdefault(sample, self._slots.new_empty(self._slots.shape[1]))
        if sample not in self._places:
            self._places[sample] = self._free.pop() if self._free else self._evict()
        self._in_use.add(sample)
        return self._slots[self._places[sample]]

    def fetch(self, sample: int, host: Tensor) -> Tensor:
        """Return a sample's device memory with its entry in it."""
        is_there = sample in self._places or sample in self._lent
        memory = self.reserve(sample)
        return memory if is_there else memory.copy_(host, non_blocking=True)

    def store(self, sample: int, host: Tensor) -> Callable[[], None]:
        """Copy a sample's entry to the host; return what waits until it is there. The device may keep it, too."""
        if sample in self._lent:
            host.copy_(self._lent.pop(sample), non_blocking=True)
        else:
            host.copy_(self._slots[self._places[sample]], non_blocking=True)
            self._in_use.discard(sample)
            self._places[sample] = self._places.pop(sample)
        if not self._slots.is_cuda:
            return no_wait
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._slots.device))
        return event.synchronize

    def forget(self, sample: int) -> None:
        self._lent.pop(sample, None)
        self._in_use.discard(sample)
        if sample in self._places:
            self._free.append(self._places.pop(sample))

    def _evict(self) -> int:
        """Take the slot of the entry used last: it is the one used again latest (see message_buffer)."""
        for sample in reversed(self._places):
            if sample not in self._in_use:
                return self._places.pop(sample)
        raise CodecError(
            f"the message buffer's device memory is all in use ({len(self._slots)} entries); raise buffers.device"
        )
