"""Which shape, which workers, where: many starts, short searches on all, long ones on the best.

A shape is a number of stages and of replicas. For each, workers are laid out in a few orders (the file's, by speed,
site after site along chains of near sites, for few workers at random), as pipelines or as stages:

    workers a b c d, 2 stages × 2 replicas
    pipelines:  replica 0 = a → b, replica 1 = c → d        good where gradients are the larger burden for far links
    stages:     replica 0 = a → c, replica 1 = b → d        good where activations are

The best starts are searched from (`placement`), cut anew (`partition`) and dealt lanes (`lanes`), in rounds: each keeps
the better part and gives it more. Limits are in changes tried, not in seconds, so that every rank of a job that makes
the plan for itself comes to the same one.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from wantrain.errors import PlanError
from wantrain.scheduler.draft import Placement
from wantrain.scheduler.estimate import choose_limits, price_all
from wantrain.scheduler.lanes import Deck, deal_by_speed, deal_evenly
from wantrain.scheduler.native import on_all_processors
from wantrain.scheduler.network import Network, chained_sites
from wantrain.scheduler.partition import split_for_workers, split_layers
from wantrain.scheduler.placement import anneal, compiled_anneal
from wantrain.scheduler.problem import (
    STRICT,
    Problem,
    Request,
    State,
    as_arrays,
    make_problem,
    make_state,
    num_pieces,
)  # fmt: skip

Major = Literal["pipelines", "stages"]

PLAIN_WORKERS = 12
"""Greatest number of workers for which loops run uncompiled: importing numba takes longer than their whole search."""

MOST_PLAYED = 2_000_000
"""Chosen: shapes with so many replicas that their exchange has more pieces are tried only where they are asked for."""

_STARTS, _MIXED, _LAST_POOL = 16, 8, 5
"""Chosen: starts in all, at least two for each shape; orders mixed at random; what is left in the last round."""

_MET = 16
"""Chosen: placements met on the way that may still be played: the simulator doesn't always agree with the estimate."""

_PLACED = ("cells", "cuts", "counts")
"""Of a state: the placement. All else follows from it."""

_READ = ("limit", "fill_s", "period_s", "trip_s", "stage_room", "stage_window")
"""What of that is read outside the search's loops."""

_KEPT = (1.0, 0.25, 0.0)
"""Chosen: shares of the starts that go on to each round, five at least; all rounds cost about the same."""

_STRICTNESS = (0.5, 2.0, STRICT)
"""Chosen: by round; the best placements often lie beyond ones that lack a little memory."""

_ALLOWANCES = (0.3, 0.3, 0.2)
"""Chosen: by how much a change may be worse than the best, by round."""


@dataclass(frozen=True)
class Candidate:
    """A placement, with what is estimated of it."""

    price: float
    problem: Problem
    state: State
    units: tuple[int, ...]

    @property
    def placement(self) -> Placement:
        """Return who holds what, replicas in the order of their first worker."""
        width, height = self.problem.num_stages, self.problem.num_replicas
        rows = [tuple(self.state.cells[r * width : (r + 1) * width]) for r in range(height)]
        ordered = sorted(zip(rows, self.units, strict=True))
        return Placement(tuple(row for row, _ in ordered), tuple(self.state.cuts), tuple(own for _, own in ordered))

    @property
    def kind(self) -> tuple[tuple[tuple[tuple[int, ...], int], ...], tuple[int, ...]]:
        """Return what tells the placement from others when workers that are alike are exchanged at will."""
        width, kind_of = self.problem.num_stages, self.problem.kind_of
        kinds = [kind_of[w] for w in self.state.cells[: width * self.problem.num_replicas]]
        rows = [tuple(kinds[at : at + width]) for at in range(0, len(kinds), width)]
        return tuple(sorted(zip(rows, self.units, strict=True))), tuple(self.state.cuts)

    @property
    def limit(self) -> list[int]:
        """Return how deep memory lets each stage run ahead, by estimate."""
        return [int(depth) for depth in self.state.limit]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of stages and of replicas."""
        return self.problem.num_stages, self.problem.num_replicas


class Searcher:
    """Searches one request's placements."""

    def __init__(self, request: Request, network: Network, deck: Deck, seed: int = 0, until_s: float | None = None):
        self.request, self.network, self.deck = request, network, deck
        self._seed = 1 + seed % (2**31 - 2)
        self._is_plain = network.num_workers <= PLAIN_WORKERS
        self._until_s = until_s
        self._random = random.Random(self._seed)
        self._problems: dict[tuple[int, int], Problem] = {}
        self._scratch = threading.local()
        self._known_starts: dict[tuple[tuple[int, int], tuple[int, ...], Major], Candidate] = {}
        self._flops = [layer.forward_flops + layer.backward_flops for layer in request.profile.layers]
        self._num_layers = len(self._flops)
        self._even: dict[int, list[int]] = {}

    @property
    def num_changes(self) -> int:
        """Changes to try in all: chosen so that a dozen workers take about a second, and few placements little."""
        if not self._is_plain:
            return min(40_000 + 900 * self.network.num_workers, 330_000)
        alike = Counter(self.network.kind_of).values()
        orders = math.factorial(self.network.num_workers) // math.prod(map(math.factorial, alike))
        most_cuts = math.comb(self._num_layers - 1, min(self._num_layers, self.network.num_workers) // 2)
        return min(8000, 200 + 10 * orders * most_cuts)

    def price(self, problem: Problem, state: State) -> float:
        """Estimate a placement; fills in its state."""
        return price_all(problem, state) if self._is_plain else self._run(problem, state, 0, 0.0, 1)

    def anneal(self, candidate: Candidate, changes: int, allowance: float, seed: int) -> Candidate:
        """Return the best placement that so many changes lead to."""
        problem, state = candidate.problem, copied(candidate.state)
        if self._is_plain:
            cells, cuts = list(state.cells), list(state.cuts)
            price = anneal(problem, state, cells, cuts, changes, allowance, seed)
        else:
            price = self._run(problem, state, changes, allowance, seed)
        return Candidate(price, problem, state, candidate.units)

    def _run(self, problem: Problem, state: State, changes: int, allowance: float, seed: int) -> float:
        """Run the search's loop as machine code; without changes it only prices."""
        key = (problem.num_stages, problem.num_replicas, problem.is_dealt, problem.strictness)
        known: dict[tuple[int, int, int, float], tuple[Problem, State]] = vars(self._scratch).setdefault("arrays", {})
        if key not in known:
            known[key] = (as_arrays(problem), as_arrays(state))
        arrays, at_work = known[key]
        for name in _PLACED:
            getattr(at_work, name)[:] = getattr(state, name)
        rest = (at_work.cells.copy(), at_work.cuts.copy(), changes, allowance, seed)
        price: float = compiled_anneal(arrays, at_work, *rest)
        for name in (*_PLACED, *_READ):
            getattr(state, name)[:] = getattr(at_work, name).tolist()
        return price

    def _even_cuts(self, num_stages: int) -> list[int]:
        """Return the cuts for equal workers."""
        if num_stages not in self._even:
            self._even[num_stages] = [0, *(end for _, end in split_layers(self._flops, num_stages))]
        return self._even[num_stages]

    def _problem(self, shape: tuple[int, int]) -> Problem:
        if shape not in self._problems:
            deck = self.deck
            self._problems[shape] = make_problem(
                self.request, self.network, *shape, deck.units, deck.microbatches_per_unit
            )
        return self._problems[shape]

    def _next_seed(self) -> int:
        return self._random.randrange(1, 2**31 - 1)

    def start(self, shape: tuple[int, int], order: Sequence[int], major: Major) -> Candidate:
        """Return workers laid out in an order, with even cuts and lanes dealt evenly."""
        key = (shape, tuple(order), major)
        if key not in self._known_starts:
            self._known_starts[key] = self._started(shape, order, major)
        return self._known_starts[key]

    def _started(self, shape: tuple[int, int], order: Sequence[int], major: Major) -> Candidate:
        num_stages, num_replicas = shape
        deck, problem = self.deck, self._problem(shape)
        units = tuple(deal_evenly(deck.units, num_replicas))
        counts = [count * deck.microbatches_per_unit for count in units]
        cells = _laid_out(problem, order, major)
        state = make_state(problem, cells, self._even_cuts(num_stages), counts)
        return Candidate(self.price(problem, state), problem, state, units)

    def placed(self, placement: Placement) -> Candidate:
        """Return a placement that was found elsewhere, priced."""
        shape = placement.num_stages, len(placement.rows)
        out = [w for w in range(self.network.num_workers) if w not in set(placement.workers)]
        counts = [count * self.deck.microbatches_per_unit for count in placement.units]
        state = make_state(self._problem(shape), [*placement.workers, *out], placement.cuts, counts)
        return Candidate(self.price(self._problem(shape), state), self._problem(shape), state, placement.units)

    @property
    def is_short_of_memory(self) -> bool:
        """Whether a layout that was tried didn't fit, even at the least depth."""
        known = self._known_starts.values()
        return any(choose_limits(one.problem, one.state) > 0 for one in known)

    def cut_anew(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the best cuts for its workers, if they are better."""
        problem, state = candidate.problem, copied(candidate.state)
        cuts = split_for_workers(problem, state, self._shares(candidate))
        if cuts is None or cuts == state.cuts:
            return candidate
        state.cuts[:] = cuts
        price = self.price(problem, state)
        return Candidate(price, problem, state, candidate.units) if price < candidate.price else candidate

    def dealt(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its lanes dealt by speed, once and for all."""
        if candidate.problem.num_replicas == self.deck.units:
            return candidate
        problem, state = candidate.problem._replace(is_dealt=1), copied(candidate.state)
        units = tuple(deal_by_speed(self.deck, state.fill_s, _paces(problem, state)))
        state.counts[:] = [count * self.deck.microbatches_per_unit for count in units]
        return Candidate(self.price(problem, state), problem, state, units)

    def starts(self, shapes: Iterable[tuple[int, int]], orders: Sequence[Sequence[int]]) -> list[list[Candidate]]:
        """Return the best layouts of each shape, cut anew, shapes in the order of their best."""
        shapes, found = list(shapes), []
        for shape in shapes:
            tried = [self.start(shape, order, major) for order in orders for major in _majors(shape)]
            best = _different(tried)[: max(2, _STARTS // len(shapes))]
            found.append(sorted(map(self.cut_anew, best), key=_price))
        return sorted(found, key=lambda own: own[0].price)

    def run(self, shapes: Sequence[tuple[int, int]], keeps_shapes: bool = False) -> list[Candidate]:
        """Return the best candidates found, best first; one of each shape at least, if that is asked for."""
        pool = [one for own in self.starts(shapes, self.orders()) for one in own]
        met: list[Candidate] = []
        for kept, allowance, strictness in zip(_KEPT, _ALLOWANCES, _STRICTNESS, strict=True):
            ranked = _different(pool)
            pool = ranked[: max(_LAST_POOL, int(len(pool) * kept))]
            pool += _firsts(ranked, {one.shape for one in pool}) if keeps_shapes else []
            pool = [self._judged(one, strictness) for one in pool]
            changes = self.num_changes // len(_KEPT) // len(pool)
            pool = self._at_once(partial(self._improved, changes=changes, allowance=allowance), pool)
            met += pool
        finished = self._at_once(self._finished, _different(pool))
        others = [
            self.dealt(self._judged(one, STRICT)) for one in _different(met)[: _MET if self._is_plain else _LAST_POOL]
        ]
        return _different([*finished, *others])

    def orders(self) -> list[list[int]]:
        """Return the orders in which workers are laid out: the file's, by speed, and along the two shortest chains."""
        workers = range(self.network.num_workers)
        by_speed = sorted(workers, key=lambda w: -self.network.speed[w])
        mixed = [self._random.sample(workers, len(workers)) for _ in range(_MIXED if self._is_plain else 0)]
        return [list(workers), by_speed, *self.site_orders()[:2], *mixed]

    def site_orders(self) -> list[list[int]]:
        """Return workers site after site along every chain of near sites, the shortest chain first, fast ones first."""
        network = self.network
        chains = chained_sites(network, max(layer.activation_elements for layer in self.request.profile.layers))
        places = [{site: place for place, site in enumerate(chain)} for chain in chains]
        workers = range(network.num_workers)
        return [sorted(workers, key=lambda w: (place[network.site_of[w]], -network.speed[w])) for place in places]

    def _at_once(self, work: Callable[[Candidate, int], Candidate], pool: Sequence[Candidate]) -> list[Candidate]:
        """Return what becomes of each candidate, worked at with a seed of its own; machine code on all processors."""
        seeds = [self._next_seed() for _ in pool]
        return list(map(work, pool, seeds)) if self._is_plain else on_all_processors(work, pool, seeds)

    def _improved(self, candidate: Candidate, seed: int, *, changes: int, allowance: float) -> Candidate:
        if self._until_s is not None and time.monotonic() > self._until_s:
            return candidate
        return self.cut_anew(self.anneal(candidate, changes, allowance, seed))

    def _judged(self, candidate: Candidate, strictness: float) -> Candidate:
        """Return the candidate as it is priced when memory is taken so strictly."""
        problem, state = candidate.problem._replace(strictness=strictness), copied(candidate.state)
        return Candidate(self.price(problem, state), problem, state, candidate.units)

    def _finished(self, candidate: Candidate, seed: int) -> Candidate:
        """Deal the lanes, and let the workers settle in with them."""
        dealt = self.dealt(candidate)
        settled = self._improved(dealt, seed, changes=self.num_changes // 20, allowance=_ALLOWANCES[-1])
        return min(dealt, self.dealt(settled), key=_price)

    def _shares(self, candidate: Candidate) -> list[float]:
        """Return the microbatches of each replica, as they are dealt or as its pace would have it."""
        if candidate.problem.is_dealt:
            return [float(count) for count in candidate.state.counts]
        paces = _paces(candidate.problem, candidate.state)
        together = sum(1 / pace for pace in paces)
        return [candidate.problem.num_microbatches / pace / together for pace in paces]


def shapes_to_try(
    request: Request, network: Network, deck: Deck, num_stages: int | None, num_replicas: int | None
) -> list[tuple[int, int]]:
    """Return the shapes to try, numbers that are given kept; raise PlanError where there is none."""
    asked = len(request.max_in_flight) if request.max_in_flight else num_stages
    num_workers, num_layers = network.num_workers, len(request.profile.layers)
    _check_layers(asked or 1, num_layers)
    most_stages = min(num_layers, num_workers // (num_replicas or 1))
    found = []
    for stages in [asked] if asked else _spaced(most_stages):
        most = min(num_workers // stages, deck.units)
        found += [(stages, replicas) for replicas in ([num_replicas] if num_replicas else _fewer(most))]
    found = [shape for shape in found if _holds_pins(shape, request)]
    found = [shape for shape in found if num_replicas or num_pieces(request, *shape) <= MOST_PLAYED] or found
    if not found:
        raise PlanError(
            f"the pinned workers need stage {max(request.pinned.values())} and a replica for each of a stage"
            f" ({num_workers} workers, {num_layers} layers); pin fewer, or to earlier stages"
        )
    return found


def _check_layers(num_stages: int, num_layers: int) -> None:
    if num_stages > num_layers:
        raise PlanError(f"{num_stages} stages need as many layers (the model has {num_layers}); lower num_stages")


def _holds_pins(shape: tuple[int, int], request: Request) -> bool:
    pins = list(request.pinned.values())
    return all(stage < shape[0] and pins.count(stage) <= shape[1] for stage in pins)


def _spaced(most: int) -> list[int]:
    """Return 1 … most, all up to 8 and then in steps of about a sixth, the last one included."""
    numbers, at = [], 1
    while at <= most:
        numbers.append(at)
        at += max(1, at // 6)
    return sorted({*numbers, most})


def _fewer(most: int) -> Iterator[int]:
    """Yield numbers of replicas: all of a few, else shares of the most there can be."""
    yield from sorted(
        set(range(1, most + 1) if most <= PLAIN_WORKERS else (most * share // 16 for share in (4, 8, 12, 14, 15, 16)))
    )


def _majors(shape: tuple[int, int]) -> tuple[Major, ...]:
    return ("pipelines",) if min(shape) == 1 else ("pipelines", "stages")


def _laid_out(problem: Problem, order: Sequence[int], major: Major) -> list[int]:
    """Fill the grid in an order, then let pinned workers change with whoever stands in their stage."""
    width, height = problem.num_stages, problem.num_replicas
    used, out = list(order[: width * height]), list(order[width * height :])
    if major == "stages":
        used = [used[s * height + r] for r in range(height) for s in range(width)]
    cells = used + out
    for w in (w for w in order if problem.pinned[w] >= 0):
        at, stage = cells.index(w), problem.pinned[w]
        if at >= width * height or at % width != stage:
            to = next(r * width + stage for r in range(height) if problem.pinned[cells[r * width + stage]] != stage)
            cells[at], cells[to] = cells[to], cells[at]
    return cells


def _paces(problem: Problem, state: State) -> list[float]:
    """Return every replica's seconds for one microbatch more, with the depths that memory allows."""
    width, share = problem.num_stages, problem.num_microbatches / problem.num_replicas
    short = [s for s in range(width) if state.limit[s] < share]
    return [
        max([state.period_s[r], *(state.trip_s[r * width + s] / max(state.limit[s], 1) for s in short)])
        for r in range(problem.num_replicas)
    ]


def _price(candidate: Candidate) -> float:
    return candidate.price


def _firsts(ranked: Iterable[Candidate], seen: set[tuple[int, int]]) -> list[Candidate]:
    """Return the best candidate of each shape that is not among those seen."""
    firsts: dict[tuple[int, int], Candidate] = {}
    for one in ranked:
        firsts.setdefault(one.shape, one)
    return [one for shape, one in firsts.items() if shape not in seen]


def _different(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates, best first, each once; exchanging workers that are alike makes no other one."""
    once: dict[Any, Candidate] = {}
    for one in sorted(candidates, key=_price):
        once.setdefault(one.kind, one)
    return list(once.values())


def copied(state: State) -> State:
    """Return a state that can be changed without changing the other."""
    return State(*(list(values) for values in state))
