"""Which slots of a buffer's file are free. A checkpoint's slots are not written to: what changed since lies elsewhere.

    slot      0   1   2   3   4   5
    home of   a   b   c   –   a'  –        a was changed after step 100 was saved, so it moved from 0 to 4
    step 100  ■   ■   ■                    claimed: these bytes are what --resume reads
    free                  ■       ■

The newest claim always holds. Older ones hold while there is room, and give way, the oldest first, before an entry is
left without a home: an older checkpoint is needed only where the newest is damaged, and what was overwritten of it
is found by the checksums. So entries that change between two saves need room twice, the others once.

All of this follows from the order of the calls alone, never from how fast the disk is: a run that goes on from a
checkpoint decides as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class FileSpace:
    """The slots of one file; pure bookkeeping, no I/O."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._num_ever_used = 0
        self._free: list[int] = []
        self._uses: dict[int, int] = {}
        self._homes: set[int] = set()
        self._claims: dict[int, frozenset[int]] = {}

    @property
    def claims(self) -> list[int]:
        """The steps whose slots are left as they are, oldest first."""
        return sorted(self._claims)

    def move(self, home: int | None) -> int | None:
        """Return where an entry that has changed may be written: its own slot, or another if a checkpoint needs that
        one; None if there is no room."""
        if home is not None:
            if self._uses[home] == 1:
                return home
            self.release(home)
        return self._take()

    def _take(self) -> int | None:
        while not self._free and self._num_ever_used == self._num_slots and len(self._claims) > 1:
            self._drop_claim(min(self._claims))
        if self._free:
            slot = self._free.pop()
        elif self._num_ever_used < self._num_slots:
            slot = self._num_ever_used
            self._num_ever_used += 1
        else:
            return None
        self._hold(slot)
        self._homes.add(slot)
        return slot

    def release(self, home: int) -> None:
        """Give back an entry's home."""
        self._homes.remove(home)
        self._let_go(home)

    def settle(self, slot: int) -> bool:
        """Make a claimed slot the home of an entry that was loaded from it; say whether it is one of this file's."""
        if slot not in self._uses or slot in self._homes:
            return False
        self._hold(slot)
        self._homes.add(slot)
        return True

    def claim(self, step: int, slots: Iterable[int] | None = None) -> None:
        """Keep slots, by default every home, as they are for the checkpoint of a step."""
        self._drop_claim(step)
        claimed = frozenset(self._homes if slots is None else (one for one in slots if 0 <= one < self._num_slots))
        for slot in claimed:
            self._hold(slot)
        self._claims[step] = claimed
        end = max(claimed, default=-1) + 1
        known = [*self._free, *range(self._num_ever_used, end)]
        self._free = [slot for slot in known if slot not in self._uses]
        self._num_ever_used = max(self._num_ever_used, end)

    def keep_claims(self, steps: Collection[int]) -> None:
        """Let go of the checkpoints that are not among `steps`."""
        for step in [one for one in self._claims if one not in steps]:
            self._drop_claim(step)

    def _drop_claim(self, step: int) -> None:
        for slot in self._claims.pop(step, ()):
            self._let_go(slot)

    def _hold(self, slot: int) -> None:
        self._uses[slot] = self._uses.get(slot, 0) + 1

    def _let_go(self, slot: int) -> None:
        self._uses[slot] -= 1
        if not self._uses[slot]:
            del self._uses[slot]
            self._free.append(slot)
