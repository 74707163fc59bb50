"""Processes meet on a store that remembers earlier attempts; threads stand for them."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from tests.jobs import run_ranks
from wantrain.comm.meeting import meet
from wantrain.errors import ChannelError, PlanError

NAMES = ["a", "b", "c"]


def meet_all(store: HashStore) -> list[str]:
    def body(rank: int) -> str:
        own = meet(store, rank, 3, 60.0, NAMES)
        own.set(f"said/{rank}", str(rank))
        own.wait([f"said/{one}" for one in range(3)])
        return str(own.add("number", 0))

    return run_ranks(3, body)


def test_every_attempt_has_a_store_of_its_own() -> None:
    store = HashStore()
    for _ in range(3):
        assert meet_all(store) == ["0", "0", "0"]
    assert store.add("wantrain/attempts", 0) == 3


def test_what_a_dead_process_left_is_not_taken_for_it() -> None:
    """Rank 1 came, and was gone before rank 0 welcomed it; then it comes again."""
    store = HashStore()
    store.set("wantrain/arrived/1", "a word of the dead")
    assert meet_all(store) == ["0", "0", "0"]


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(ChannelError, match=r"^b, c did not come within 0.2 s"):
        meet(HashStore(), 0, 3, 0.2, NAMES)
    with pytest.raises(ChannelError, match=r"^a did not come within 0.2 s"):
        meet(HashStore(), 1, 3, 0.2, NAMES)


def test_a_rank_claimed_twice_is_refused() -> None:
    store = HashStore()

    def claim(_: int) -> str:
        try:
            meet(store, 1, 3, 5.0, NAMES)
        except (PlanError, ChannelError) as caught:
            return type(caught).__name__
        return "met"

    assert sorted(run_ranks(2, claim)) == ["ChannelError", "PlanError"]
