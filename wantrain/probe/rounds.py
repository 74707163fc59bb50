"""Who is measured with whom: rounds of disjoint pairs, so that no two measurements of a round meet in a worker.

The circle method of tournaments: one stays, the others turn by a seat a round, and who sit opposite each other meet.
For six workers:

    round 0    0 1 2      round 1    0 5 1      round 2    0 4 5       …
               5 4 3                 4 3 2                 3 2 1

N workers take N − 1 rounds (N where N is odd: one rests in each), instead of the N(N−1)/2 of one pair at a time. Of a
pair the earlier one comes first: where workers are listed by site, all pairs of a round that cross the same two sites
cross them the same way, so whether they disturb each other is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def tournament(players: Sequence[T]) -> list[list[tuple[T, T]]]:
    """Return rounds of disjoint pairs in which everybody meets everybody else exactly once."""
    circle: list[int | None] = list(range(len(players)))
    if len(circle) % 2:
        circle.append(None)
    rounds = []
    for _ in range(len(circle) - 1 if len(players) > 1 else 0):
        half = len(circle) // 2
        meeting = zip(circle[:half], reversed(circle[half:]), strict=True)
        pairs = [sorted((a, b)) for a, b in meeting if a is not None and b is not None]
        rounds.append([(players[a], players[b]) for a, b in pairs])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds
