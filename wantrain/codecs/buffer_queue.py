"""Which samples are used next, and which of them have a right to memory.

    queue     7 3 9 9 1 4 8 …      announced, in order of use; a sample may come twice
    promised  7 3                  asked for by `known` or in use: theirs until they are used
    window    7 3 9 1              the promised ones, then the queue, as many different ones as memory holds

As samples are used the window slides on, and what enters it is read from the file. What lies beyond it has no claim to
memory yet, so `known` answers that it isn't held, and it comes as a first visit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class UseQueue:
    """The order in which samples will be used, and the window of those that memory is for."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue: list[int] = []
        self._promised: dict[int, None] = {}
        self.window: dict[int, None] = {}
        """The samples with a right to memory, the next one first; at most `capacity`."""

    def replace(self, sample_ids: Iterable[int]) -> None:
        """Say what comes after the samples that are promised."""
        self._queue = list(sample_ids)
        self._slide()

    def put_first(self, sample_ids: Sequence[int]) -> None:
        """Move samples to the front, or add them there."""
        rest = Counter(sample_ids)
        moved = []
        for sample in self._queue:
            if rest[sample] > 0:
                rest[sample] -= 1
            else:
                moved.append(sample)
        self._queue = [*sample_ids, *moved]
        self._slide()

    def promise(self, sample: int) -> bool:
        """Keep a sample in the window until it is used; say whether there is room for it."""
        if sample not in self._promised:
            if len(self._promised) == self._capacity:
                return False
            self._promised[sample] = None
            if sample not in self.window:
                self._slide()
        return True

    def used(self, sample: int) -> None:
        """Note that a sample was used once."""
        self._promised.pop(sample, None)
        if sample in self._queue:
            self._queue.remove(sample)
        self._slide()

    def withdraw(self, sample: int) -> None:
        """Take back a promise."""
        self._promised.pop(sample, None)
        self._slide()

    def _slide(self) -> None:
        wanted = dict.fromkeys([*self._promised, *self._queue])
        self.window = dict.fromkeys(list(wanted)[: self._capacity])
