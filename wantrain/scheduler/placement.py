"""Search over who holds what: swap workers, move stages, hand on layers, and keep what leads on.

Record-to-record travel (Dueck, "New Optimization Heuristics", J. Computational Physics 104, 1993): a change is kept
where the result is not worse than the best seen by more than an allowance, which shrinks to nothing. It has no
temperature to tune, needs no exponential, and a minimum of plateaus (any maximum over workers has many) is left easily.

Random numbers are Park and Miller's generator (CACM 31, 1988): equal on every machine and in both forms of the code.
"""

from __future__ import annotations

from wantrain.scheduler import estimate
from wantrain.scheduler.estimate import fit_stage, price, price_all, time_pipeline, time_reduction
from wantrain.scheduler.native import compiled
from wantrain.scheduler.problem import Numbers, Problem, State

_WHOLE_STAGES, _MANY = 24, 288
"""Chosen: of a hundred changes so many concern whole stages, of four kinds alike; the rest swap two workers. They cost
as much as there are workers, so of 12 workers on they become rarer, down to two in a hundred."""


def next_random(random: int) -> int:
    """Return the number after `random`, both in 1 … 2³¹ - 2."""
    return (random * 48271) % 2147483647


def may_hold(problem: Problem, worker: int, cell: int) -> bool:
    """Return whether a worker may stand in a cell: pinned ones only in their stage."""
    stage = problem.pinned[worker]
    return bool(stage < 0 or (cell < problem.num_stages * problem.num_replicas and cell % problem.num_stages == stage))


def refresh_cell(problem: Problem, state: State, cell: int, other: int) -> None:
    """Bring up to date what a cell's worker has a part in, but for what the other one has a part in too."""
    num_stages = problem.num_stages
    num_used = num_stages * problem.num_replicas
    if cell >= num_used:
        return
    s = cell % num_stages
    if other >= num_used or cell // num_stages != other // num_stages:
        time_pipeline(problem, state, cell // num_stages)
    if other >= num_used or s != other % num_stages:
        time_reduction(problem, state, s)
    if s > 0:
        fit_stage(problem, state, s - 1)
    if s + 1 < num_stages:
        fit_stage(problem, state, s + 1)


def swap_workers(problem: Problem, state: State, i: int, j: int) -> None:
    """Let two cells change workers."""
    state.cells[i], state.cells[j] = state.cells[j], state.cells[i]
    refresh_cell(problem, state, i, len(state.cells))
    refresh_cell(problem, state, j, i)


def exchange_stages(problem: Problem, state: State, a: int, b: int) -> bool:
    """Let two stages change workers in all replicas; return whether pinned workers allow it."""
    num_stages = problem.num_stages
    for r in range(problem.num_replicas):
        i, j = r * num_stages + a, r * num_stages + b
        if not (may_hold(problem, state.cells[i], j) and may_hold(problem, state.cells[j], i)):
            return False
    swap_columns(problem, state, a, b)
    price_all(problem, state)
    return True


def swap_columns(problem: Problem, state: State, a: int, b: int) -> None:
    """Let two stages change workers in all replicas, and bring nothing up to date."""
    for r in range(problem.num_replicas):
        i, j = r * problem.num_stages + a, r * problem.num_stages + b
        state.cells[i], state.cells[j] = state.cells[j], state.cells[i]


def reverse_stages(problem: Problem, state: State, a: int, b: int) -> bool:
    """Turn round the run of stages from a to b, in all replicas; return whether nobody is pinned."""
    if problem.has_pins:
        return False
    low, high = min(a, b), max(a, b)
    while low < high:
        swap_columns(problem, state, low, high)
        low, high = low + 1, high - 1
    price_all(problem, state)
    return True


def move_stage(problem: Problem, state: State, a: int, b: int) -> bool:
    """Move a stage's workers to stage b, those between moving on by one; return whether nobody is pinned."""
    if problem.has_pins:
        return False
    step = 1 if b > a else -1
    while a != b:
        swap_columns(problem, state, a, a + step)
        a += step
    price_all(problem, state)
    return True


def hand_on_layer(problem: Problem, state: State, a: int, b: int) -> bool:
    """Give a layer of stage a to stage b, those between handing one on; return whether a has one to spare."""
    if a == b or state.cuts[a + 1] - state.cuts[a] < 2:
        return False
    if a < b:
        for s in range(a + 1, b + 1):
            state.cuts[s] -= 1
    else:
        for s in range(b + 1, a + 1):
            state.cuts[s] += 1
    price_all(problem, state)
    return True


def change(problem: Problem, state: State, kind: int, i: int, j: int) -> bool:
    """Apply a change, which the same with i and j swapped undoes; return whether it could be."""
    if kind == 0:
        swap_workers(problem, state, i, j)
        return True
    if kind == 1:
        return exchange_stages(problem, state, i, j)
    if kind == 3:
        return reverse_stages(problem, state, i, j)
    if kind == 4:
        return move_stage(problem, state, i, j)
    return hand_on_layer(problem, state, i, j)


def anneal(
    problem: Problem, state: State, best_cells: Numbers, best_cuts: Numbers, moves: int, allowance: float, random: int
) -> float:
    """Try so many changes; leave the best placement met in `state` and return its price."""
    num_stages = problem.num_stages
    num_used = num_stages * problem.num_replicas
    num_workers = len(state.cells)
    whole_stages = min(_WHOLE_STAGES, max(2, _MANY // num_workers))
    now = best = price_all(problem, state)
    best_cells[:] = state.cells
    best_cuts[:] = state.cuts
    for move in range(moves):
        random = next_random(random)
        chance = random % 100
        random = next_random(random)
        i = random % num_used
        random = next_random(random)
        j = random % num_workers
        kind = 0
        if num_stages > 1 and chance < whole_stages:
            kind, i, j = 1 + chance % 4, i % num_stages, j % num_stages
        if kind == 0:
            a, b = state.cells[i], state.cells[j]
            if problem.kind_of[a] == problem.kind_of[b] and problem.pinned[a] == problem.pinned[b]:
                continue
            if not (may_hold(problem, a, j) and may_hold(problem, b, i)):
                continue
        if not change(problem, state, kind, i, j):
            continue
        left = 1 - move / moves
        then = price(problem, state)
        if then <= best * (1 + allowance * left * left):
            now = then
            if now < best:
                best = now
                best_cells[:] = state.cells
                best_cuts[:] = state.cuts
        else:
            change(problem, state, kind, j, i)
    state.cells[:] = best_cells
    state.cuts[:] = best_cuts
    return price_all(problem, state)


_HELPERS = (
    *estimate.HELPERS,
    price_all,
    next_random,
    may_hold,
    refresh_cell,
    swap_workers,
    swap_columns,
    exchange_stages,
    reverse_stages,
    move_stage,
    hand_on_layer,
    change,
)

compiled_anneal = compiled(anneal, *_HELPERS)
"""The same loop as machine code, for problems and states made of arrays."""
