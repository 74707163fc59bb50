"""The best plan there is, for few workers: every placement and every split, played. What the search is held against.

It shares with the search how a placement is written down (`draft`), and the simulator; the search borrows its bounds
where few workers are short of memory, for then most changes lead to what doesn't fit. Every choice of workers, every
layout of them on the grid and every cut of the layers is looked at, at one number of microbatches and one depth, in the
order of a bound that no play can beat. For a replica of n microbatches, and any stage k not before s,

    last backward on s ends ≥ way of the first forward to k + n · (forward + backward) on k + way home of the last to s
                            ≥ … with the n payloads of a link in one direction for what is computed on k
    step                    ≥ that, + the exchange of s's gradients as far as no backward can hide it, + the optimizer

and the enumeration ends where the bound reaches the best step seen. Replicas take equally many microbatches, so their
order is nothing: of such layouts one is looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wantrain.errors import PlanError
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import make_workload
from wantrain.scheduler.draft import Drafter, Placement
from wantrain.scheduler.lanes import deal_evenly, make_deck
from wantrain.scheduler.network import Network, make_network
from wantrain.scheduler.playing import Player
from wantrain.scheduler.problem import Request
from wantrain.topology import Topology

MOST_WORKERS = 8

MOST_LOOKED_AT = 250_000
"""Chosen: placements whose bounds a search may look at; half a second of arithmetic on whole arrays."""

_MOST_DRAFTED = 400
"""Chosen: the bounds leave out what channels and payloads take, so that many of the best don't fit after all."""

Table = NDArray[np.float64]
Rows = NDArray[np.int64]


class Exact(NamedTuple):
    """The best plan, its seconds, and what it took to know."""

    plan: Plan
    step_s: float
    num_candidates: int
    num_played: int


def exact_plan(
    topology: Topology,
    profile: ModelProfile,
    *,
    batch_size: int,
    num_stages: int,
    num_replicas: int,
    max_in_flight: Sequence[int],
    **choices: Any,
) -> Exact:
    """Return the best of all plans of a shape; `choices` are those of `find_plan` that say what is run.

    Raises PlanError for more workers than can be gone through, lanes that can't be dealt evenly, or where none fits.
    """
    if len(topology.workers) > MOST_WORKERS:
        raise PlanError(
            f"too many workers to try all plans (got {len(topology.workers)}, expected at most {MOST_WORKERS})"
        )
    request = Request(profile=profile, batch_size=batch_size, max_in_flight=tuple(max_in_flight), **choices)
    if request.schedule == "zero_bubble":
        raise PlanError("bounds are of whole backwards; a zero_bubble can't be planned exactly, use find_plan")
    network = make_network(topology, [worker.name for worker in topology.workers])
    deck = make_deck(batch_size, profile.microbatch_size, num_replicas, num_replicas)
    drafter = Drafter(request, topology, network, deck)
    units = tuple(deal_evenly(deck.units, num_replicas))
    every = _Every(network, drafter, Player(topology, profile, drafter), topology, profile, units)
    return every.best(layouts(network.num_workers, num_stages, num_replicas))


def likely_placements(
    topology: Topology, request: Request, network: Network, player: Player, shape: tuple[int, int],
    units: Sequence[int], most: int,
) -> list[Placement]:  # fmt: skip
    """Return the placements of a shape with the least bounds of all that fit at 1F1B's own depth, the best first.

    None where there are too many to look at, or replicas are dealt lanes unevenly: the bounds take them for equal.
    """
    num_stages, num_replicas = shape
    num_splits = math.comb(len(request.profile.layers) - 1, num_stages - 1)
    num_layouts = math.perm(network.num_workers, num_stages * num_replicas) // math.factorial(num_replicas)
    if num_layouts * num_splits > MOST_LOOKED_AT or len(set(units)) > 1:
        return []
    every = _Every(network, player.drafter, player, topology, request.profile, tuple(units))
    rows, found = layouts(network.num_workers, num_stages, num_replicas), []
    for cuts in splits(len(request.profile.layers), num_stages):
        bound = every.bounds(rows, cuts)
        few = np.argsort(bound, kind="stable")[:_MOST_DRAFTED]
        found += [(float(bound[at]), cuts, int(at)) for at in few if bound[at] < np.inf]
    ordered = (Placement(_rows(rows[at]), cuts, tuple(units)) for _, cuts, at in sorted(found)[:_MOST_DRAFTED])
    fitting = (one for one in ordered if player.shortage(every.draft(one)) is None)
    return list(itertools.islice(fitting, most))


def _rows(grid: Rows) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in grid)


def layouts(num_workers: int, num_stages: int, num_replicas: int) -> Rows:
    """Return every grid of workers, [layout, replica, stage], replicas in the order of their first worker."""
    rows = itertools.permutations(range(num_workers), num_stages * num_replicas)
    firsts = range(0, num_stages * num_replicas, num_stages)
    kept = [row for row in rows if all(row[a] < row[b] for a, b in itertools.pairwise(firsts))]
    return np.array(kept, dtype=np.int64).reshape(-1, num_replicas, num_stages)


def splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to cut layers into stages."""
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *cuts, num_layers)


class _Every(NamedTuple):
    """All that is needed to bound and to play the plans of one shape."""

    network: Network
    drafter: Drafter
    player: Player
    topology: Topology
    profile: ModelProfile
    units: tuple[int, ...]

    def best(self, rows: Rows) -> Exact:
        """Play plans in the order of their bounds until no bound is below the best step."""
        bounds, splits_of, rows_of = [], [], []
        cuts = list(splits(len(self.profile.layers), rows.shape[2]))
        for number, cut in enumerate(cuts):
            bound = self.bounds(rows, cut)
            few = np.flatnonzero(np.isfinite(bound))
            bounds.append(bound[few])
            rows_of.append(few)
            splits_of.append(np.full(len(few), number))
        bound, row, split = (np.concatenate(every) for every in (bounds, rows_of, splits_of))
        best: tuple[float, Plan | None] = (np.inf, None)
        played = 0
        for at in np.argsort(bound, kind="stable"):
            if bound[at] >= best[0]:
                break
            plan = self.draft(Placement(_rows(rows[row[at]]), cuts[split[at]], self.units))
            if self.player.shortage(plan) is None:
                played += 1
                best = min(best, (self.player.seconds(plan), plan), key=lambda one: one[0])
        if best[1] is None:
            raise PlanError("no plan fits into the workers' memory; add a worker, or lower microbatch_size")
        return Exact(best[1], best[0], len(bound), played)

    def draft(self, placement: Placement) -> Plan:
        """Return a placement's plan, at the depth that is asked for or 1F1B's own."""
        return self.drafter.plan(placement, next(self.drafter.depths(placement, ())))

    def bounds(self, rows: Rows, cuts: tuple[int, ...]) -> Table:
        """Return what no play of each grid can beat, with these cuts; infinite where memory can't suffice."""
        plan = self.draft(Placement(_rows(rows[0]), cuts, self.units))
        load = make_workload(plan, self.topology, self.profile)
        count, num_replicas = plan.replicas[0].num_microbatches, rows.shape[1]
        layers = [self.profile.layers[first:end] for first, end in itertools.pairwise(cuts)]
        slowness = 1 / np.array(self.network.speed)[rows]
        forward = np.array([sum(layer.forward_flops for layer in own) for own in layers]) * slowness
        backward = np.array([sum(layer.backward_flops for layer in own) for own in layers]) * slowness
        there = self._crossing(rows[:, :, :-1], rows[:, :, 1:], load.forward_bytes[:-1])
        back = self._crossing(rows[:, :, 1:], rows[:, :, :-1], load.backward_bytes[1:])
        ends = _ends(forward, backward, there, back, count)
        if num_replicas > 1:
            buckets = np.array([len(own) for own in load.bucket_bytes])
            pieces = np.array([sum(own) / num_replicas for own in load.bucket_bytes])
            ends = ends + np.maximum(self._exchange(rows, pieces) - backward * (1 - 1 / np.maximum(buckets, 1)), 0)
        optimizer = np.array(load.step_s).reshape(rows.shape[1:])[0] / slowness[0, 0] * slowness
        bound = np.asarray((ends + optimizer).max(axis=(1, 2)))
        return np.where(self._may_fit(rows, plan), bound, np.inf)

    def _links(self, source: Rows, target: Rows) -> tuple[Table, Table]:
        """Return seconds per byte and latency of links."""
        class_of = np.array(self.network.class_of)
        link = class_of[source] * self.network.num_classes + class_of[target]
        return np.array(self.network.s_per_byte)[link], np.array(self.network.latency_s)[link]

    def _crossing(self, source: Rows, target: Rows, num_bytes: Sequence[int]) -> tuple[Table, Table]:
        """Return how long each link is taken by a payload, and its latency."""
        s_per_byte, latency_s = self._links(source, target)
        return s_per_byte * np.array(num_bytes), latency_s

    def _exchange(self, rows: Rows, pieces: Table) -> Table:
        """Return for each cell how long the busiest link from it is taken by its stage's gradients, and the latency."""
        worst = np.zeros(rows.shape)
        for a, b in itertools.permutations(range(rows.shape[1]), 2):
            s_per_byte, latency_s = self._links(rows[:, a], rows[:, b])
            worst[:, a] = np.maximum(worst[:, a], 2 * pieces * s_per_byte + latency_s)
        return worst

    def _may_fit(self, rows: Rows, plan: Plan) -> NDArray[np.bool_]:
        """Return where weights, gradients, moments and activations alone would fit."""
        least = []
        for stage in plan.stages:
            layers = self.profile.layers[stage.first_layer : stage.end_layer]
            stored = sum(layer.stored_bytes for layer in layers)
            weights = sum(4 * layer.parameter_bytes + layer.frozen_bytes for layer in layers)
            least.append(weights + stage.max_in_flight * stored)
        return np.asarray((np.array(self.network.memory)[rows] >= np.array(least)).all(axis=(1, 2)))


def _ends(forward: Table, backward: Table, there: tuple[Table, Table], back: tuple[Table, Table], count: int) -> Table:
    """Return for each cell when its last backward ends at the earliest."""
    num_stages = forward.shape[2]
    out, home = there[0] + there[1], back[0] + back[1]
    zero = np.zeros_like(forward[:, :, :1])
    head = np.concatenate([zero, np.cumsum(forward[:, :, :-1] + out, axis=2)], axis=2)
    # returns: from the start of the last stage's backward to the end of this stage's
    returns = np.cumsum((np.concatenate([home, zero], axis=2) + backward)[:, :, ::-1], axis=2)[:, :, ::-1]
    turn = head[:, :, -1] + forward[:, :, -1]
    ends = np.zeros_like(forward)
    for s in range(num_stages):
        for k in range(s, num_stages):
            way = returns[:, :, s] - returns[:, :, k]
            busy = head[:, :, k] + count * (forward[:, :, k] + backward[:, :, k]) + way
            ends[:, :, s] = np.maximum(ends[:, :, s], busy)
        for k in range(num_stages - 1):
            sent = turn + (count - 1) * there[0][:, :, k] + returns[:, :, s]
            ends[:, :, s] = np.maximum(ends[:, :, s], sent)
        for k in range(s, num_stages - 1):
            answered = turn + returns[:, :, s] + (count - 1) * back[0][:, :, k]
            ends[:, :, s] = np.maximum(ends[:, :, s], answered)
    return ends
