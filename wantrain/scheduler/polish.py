"""Improve a plan with the simulator itself: apply the first change that makes the step faster, until none does.

Changes are those of `placement`: two workers swapped, whole stages moved, a layer handed on. They are tried in the
order of their estimates, and those that the estimate holds to be far worse are not played at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from wantrain.plan import Plan
from wantrain.scheduler.estimate import price, price_all
from wantrain.scheduler.placement import change, may_hold
from wantrain.scheduler.playing import Player
from wantrain.scheduler.search import Candidate, copied

_WORTH_PLAYING = 1.5
"""Chosen: a change whose estimate is worse than the plan's by more is not played."""

_BETTER = 1 - 1e-6
"""Chosen: less is rounding."""

Change = tuple[int, int, int]


def polish(player: Player, candidate: Candidate, plan: Plan, score: float, most: int) -> tuple[Candidate, Plan]:
    """Return the candidate and its plan, improved; plays at most so many things."""
    depths, postponed = ([getattr(stage, name) for stage in plan.stages] for name in ("max_in_flight", "max_postponed"))
    left = most // player.size_of(plan)
    is_better = True
    while is_better and left > 0:
        is_better = False
        for neighbour in itertools.islice(neighbours(candidate), left):
            left -= 1
            draft = player.drafter.plan(neighbour.placement, depths, postponed)
            if player.shortage(draft) is None and (then := player.score(draft)) < score * _BETTER:
                candidate, plan, score, is_better = neighbour, draft, then, True
                break
    return candidate, plan


def neighbours(candidate: Candidate) -> Iterator[Candidate]:
    """Yield what is one change away, the best estimate first."""
    problem, state = candidate.problem, copied(candidate.state)
    base = price_all(problem, state)
    found: list[tuple[float, Change]] = []
    for kind, i, j in _changes(candidate):
        if change(problem, state, kind, i, j):
            found.append((price(problem, state), (kind, i, j)))
            change(problem, state, kind, j, i)
    for estimate, (kind, i, j) in sorted(found):
        if estimate > base * _WORTH_PLAYING:
            return
        moved = copied(candidate.state)
        price_all(problem, moved)
        change(problem, moved, kind, i, j)
        price(problem, moved)
        yield Candidate(estimate, problem, moved, candidate.units)


def _changes(candidate: Candidate) -> Iterator[Change]:
    """Yield every change of a placement that makes a difference: its kind, and what it takes."""
    problem, cells = candidate.problem, candidate.state.cells
    num_stages, num_used = problem.num_stages, problem.num_stages * problem.num_replicas
    for i, j in itertools.combinations(range(len(cells)), 2):
        a, b = cells[i], cells[j]
        alike = problem.kind_of[a] == problem.kind_of[b] and problem.pinned[a] == problem.pinned[b]
        if i < num_used and not alike and may_hold(problem, a, j) and may_hold(problem, b, i):
            yield 0, i, j
    for a, b in itertools.permutations(range(num_stages), 2):
        yield 2, a, b
        yield 4, a, b
        if a < b:
            yield 1, a, b
            yield 3, a, b
