"""Host memory for a fixed number of entries, taken once; pinned where a GPU copies from it."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from wantrain.codecs.buffer_file import Memory, slot_bytes
from wantrain.errors import ConfigError
from wantrain.units import format_bytes


class Arena:
    """Slots in host memory, each aligned for direct I/O."""

    def __init__(self, num_slots: int, entry_bytes: int, device: torch.device) -> None:
        """`device`: what the entries are copied to."""
        self._entry_bytes, self._slot_bytes = entry_bytes, slot_bytes(entry_bytes)
        self._memory = torch.frombuffer(mmap.mmap(-1, num_slots * self._slot_bytes), dtype=torch.uint8)
        self._is_pinned = device.type == "cuda"
        if self._is_pinned:
            _pin(self._memory)
        self.free = list(range(num_slots))[::-1]
        self.num_slots = num_slots

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    def close(self) -> None:
        """Let go of the memory; none of it may be in use."""
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]

    def memory(self, slot: int) -> Memory:
        """Return a whole slot, for the file."""
        start = slot * self._slot_bytes
        memory: Memory = self._memory[start : start + self._slot_bytes].numpy()
        return memory

    def entry(self, slot: int) -> Tensor:
        """Return the entry in a slot."""
        start = slot * self._slot_bytes
        return self._memory[start : start + self._entry_bytes]


def _pin(memory: Tensor) -> None:
    """Let a GPU copy from and to memory directly. (Torch's own pinned memory is rounded up to a power of two.)"""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))  # type: ignore[no-untyped-call]
    if status != 0:
        raise ConfigError(
            f"can't pin {format_bytes(memory.numel())} of host memory (CUDA says {status}); lower buffers.ram"
        )
