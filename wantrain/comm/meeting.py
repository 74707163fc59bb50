"""How the processes of a job agree that they are of one attempt, on a store that outlives attempts.

torchrun starts workers again after a failure, on every machine in its own time, and gives them the same store. What an
earlier attempt left there must not be taken for an answer, and torchrun's count of restarts is no help: each machine
counts its own. So rank 0 numbers the attempts, and every process comes with a word that nobody used before:

    rank r:   arrived/r = WORD    ──►   rank 0:  welcome/r/WORD = attempt    ──►   rank r:  here/attempt/r

A word of a process that is gone may be welcomed, but nobody comes for it; rank 0 waits for the next one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from torch._C._distributed_c10d import PrefixStore, Store

from wantrain.comm.gloo import reason
from wantrain.errors import ChannelError, PlanError

_POLL_S = 0.05


def meet(store: Store, rank: int, world_size: int, timeout_s: float, names: Sequence[str]) -> Store:
    """Return a store of this attempt's own, once all ranks are there; `names` are theirs, for errors.

    Raise PlanError where two processes claim a rank, ChannelError where somebody doesn't come.
    """
    here = PrefixStore("wantrain", store)
    try:
        return _Meeting(here, rank, world_size, time.monotonic() + timeout_s, names).hold()
    except TimeoutError as caught:
        raise ChannelError(f"{caught} did not come within {timeout_s:g} s; are all running?") from None
    except RuntimeError as caught:
        raise ChannelError(f"lost where the workers meet ({reason(caught)}); is the first worker running?") from None


class _Meeting:
    def __init__(self, store: Store, rank: int, world_size: int, deadline_s: float, names: Sequence[str]) -> None:
        self._store, self._rank, self._names = store, rank, names
        self._others = range(1, world_size)
        self._deadline_s = deadline_s
        self._word = uuid.uuid4().hex

    def hold(self) -> Store:
        self._store.set(f"arrived/{self._rank}", self._word)
        attempt = self._welcome_others() if self._rank == 0 else self._await_welcome()
        return PrefixStore(attempt, self._store)

    def _welcome_others(self) -> str:
        attempt = str(self._store.add("attempts", 1))
        welcomed: dict[int, str] = {}
        while True:
            absent = [rank for rank in self._others if not self._has(f"here/{attempt}/{rank}")]
            if not absent:
                return attempt
            for rank in absent:
                word = self._word_of(rank)
                if word and welcomed.get(rank) != word:
                    self._store.set(f"welcome/{rank}/{word}", attempt)
                    welcomed[rank] = word
            self._pause(", ".join(self._names[rank] for rank in absent))

    def _await_welcome(self) -> str:
        welcome = f"welcome/{self._rank}/{self._word}"
        while not self._has(welcome):
            self._pause(self._names[0])
        attempt = self._store.get(welcome).decode()
        self._store.set(f"here/{attempt}/{self._rank}", self._word)
        return attempt

    def _pause(self, awaited: str) -> None:
        """Wait a little; raise PlanError where another process has come as this rank, TimeoutError when it's late."""
        if self._word_of(self._rank) != self._word:
            raise PlanError(f"two processes claim rank {self._rank} of the plan; give each its own --worker")
        if time.monotonic() > self._deadline_s:
            raise TimeoutError(awaited)
        time.sleep(_POLL_S)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _word_of(self, rank: int) -> str:
        return self._store.get(f"arrived/{rank}").decode() if self._has(f"arrived/{rank}") else ""
