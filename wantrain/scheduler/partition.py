"""Cut the layers into stages, exactly, by dynamic programming.

    best[s][b] = min over a < b of max(best[s-1][a], cost of layers a … b-1 on stage s)

For equal workers a stage costs its operations. For given ones it costs what its slowest worker takes over a whole step,
or the link behind it if that takes longer: which layer a cut lies behind says how many bytes cross it. Where a stage's
weights, and one microbatch in flight, don't fit into the memory of one of its workers, the cost is infinite.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.errors import PlanError
from wantrain.scheduler.problem import Problem, State

Table = NDArray[np.float64]


def split_layers(costs: Sequence[float], num_stages: int) -> list[tuple[int, int]]:
    """Cut layers into consecutive stages so that the costliest stage costs least; return [first, end) of each."""
    if num_stages > len(costs):
        raise PlanError(f"{num_stages} stages need as many layers (the model has {len(costs)}); lower num_stages")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    table = sums[None, :] - sums[:, None]
    cuts = best_cuts([table] * num_stages)
    assert cuts is not None
    return list(itertools.pairwise(cuts))


def best_cuts(tables: Sequence[Table]) -> list[int] | None:
    """Return the cuts that make the costliest stage cheapest; `tables[s][a, b]` is what layers a … b-1 cost on s."""
    size = len(tables[0])
    empty = np.arange(size)[:, None] >= np.arange(size)[None, :]
    best = np.full(size, np.inf)
    best[0] = 0.0
    origins: list[Any] = []
    for table in tables:
        through = np.where(empty, np.inf, np.maximum(best[:, None], table))
        origins.append(through.argmin(axis=0))
        best = through.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    cuts = [size - 1]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1]]))
    return cuts[::-1]


def split_for_workers(problem: Problem, state: State, counts: Sequence[float]) -> list[int] | None:
    """Return the best cuts for the workers of a placement whose replicas take so many microbatches; None: none fit."""
    return best_cuts([_stage_table(problem, state, counts, s) for s in range(problem.num_stages)])


def _stage_table(problem: Problem, state: State, counts: Sequence[float], s: int) -> Table:
    flops = np.asarray(problem.forward_flops) + np.asarray(problem.backward_flops)
    column = [int(state.cells[r * problem.num_stages + s]) for r in range(problem.num_replicas)]
    slowest = max(count * problem.s_per_flop[w] for count, w in zip(counts, column, strict=True))
    table = slowest * (flops[None, :] - flops[:, None])
    if s + 1 < problem.num_stages:
        table = np.maximum(table, _crossing_s(problem, state, counts, s)[None, :])
    fits = _needed_bytes(problem, s) <= state.stage_room[s] - max(state.stage_window)
    return np.where(fits, table, np.inf)


def _crossing_s(problem: Problem, state: State, counts: Sequence[float], s: int) -> Table:
    """Return what the links behind stage s need for a step, by the cut's place."""
    there = back = 0.0
    for r, count in enumerate(counts):
        w, v = (int(state.cells[r * problem.num_stages + s + i]) for i in (0, 1))
        a, b = problem.class_of[w], problem.class_of[v]
        there = max(there, count * problem.s_per_byte[a * problem.num_classes + b])
        back = max(back, count * problem.s_per_byte[b * problem.num_classes + a])
    seconds = np.maximum(there * np.asarray(problem.forward_bytes), back * np.asarray(problem.backward_bytes))
    return np.concatenate([[0.0], seconds])


def _needed_bytes(problem: Problem, s: int) -> Table:
    """Return the memory that stage s needs at least, by its first and end layer, as `estimate.size_stages` counts."""
    weights, stored = np.asarray(problem.parameter_bytes), np.asarray(problem.stored_bytes)
    frozen = np.asarray(problem.frozen_bytes)
    held = weights[None, :] - weights[:, None]
    payloads = np.concatenate([[0.0], np.asarray(problem.forward_bytes) + np.asarray(problem.backward_bytes)])
    kept = stored[None, :] - stored[:, None]
    needed: Table = (
        problem.weight_copies * held
        + (frozen[None, :] - frozen[:, None])
        + problem.least_depth[s] * kept
        + _largest_within(tuple(problem.largest_stored_bytes))
    )
    if problem.num_replicas > 1:
        needed = needed + 4 * np.minimum(problem.bucket_bytes, held)
    if s + 1 < problem.num_stages:
        needed = needed + problem.least_depth[s] * payloads[None, :]
    return needed + problem.least_depth[s - 1] * payloads[:, None] if s > 0 else needed


@functools.lru_cache(maxsize=4)
def _largest_within(stored_bytes: tuple[float, ...]) -> Table:
    """Return the most that one of layers a … b-1 stores."""
    size = len(stored_bytes) + 1
    largest = np.zeros((size, size))
    for a in range(size - 1):
        largest[a, a + 1 :] = np.maximum.accumulate(np.asarray(stored_bytes[a:]))
    return largest
