"""Make a plan: search over placements with an estimate, play the finalists, take the best.

The estimate (`estimate`) is cheap and steers the search (`search`); the simulator decides (`playing`). Among the
finalists are always the naive plan and the best one that keeps sites together, so that neither is ever better than what
is returned. The winner is then improved step by step with the simulator itself (`polish`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

from wantrain.errors import PlanError, did_you_mean
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.schedule import WITH_DEPTH, ScheduleKind, default_in_flight
from wantrain.scheduler.cost_model import predict
from wantrain.scheduler.draft import Drafter
from wantrain.scheduler.exact import MOST_WORKERS, likely_placements
from wantrain.scheduler.lanes import deal_evenly, make_deck
from wantrain.scheduler.native import on_all_processors
from wantrain.scheduler.network import make_network
from wantrain.scheduler.playing import Objective, Player
from wantrain.scheduler.polish import polish
from wantrain.scheduler.problem import Request
from wantrain.scheduler.search import PLAIN_WORKERS, Candidate, Searcher, shapes_to_try
from wantrain.topology import Topology
from wantrain.units import format_time

_FINALISTS = 6
"""Chosen: placements that are played; more hardly ever change the winner."""

_POLISHED, _PLAYED = 4, 6_000
"""Chosen: finalists that are improved, and what each may cost, in things played: a quarter of a second."""


@dataclass(frozen=True)
class Search:
    """What a search came to: the plan, what it is to be held against, and what a user should know about it."""

    plan: Plan
    naive: Plan | None
    """File order, even split, lanes dealt evenly, the same codecs; None where that doesn't fit into memory."""
    together: Plan | None
    """The best that keeps sites together; None where none fits."""
    others: tuple[Plan, ...]
    """The best of other shapes that were played, best first."""
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


class Choices(TypedDict, total=False):
    """What else may be asked of a plan; see `find_plan`."""

    model: str
    num_stages: int | None
    num_replicas: int | None
    num_lanes: int | None
    schedule: ScheduleKind
    max_in_flight: Sequence[int] | None
    forward_codec: str
    backward_codec: str
    gradient_codec: str
    bucket_bytes: int | None
    max_codec_error: float | None
    buffer_bytes: int
    pinned: Mapping[str, int] | None
    excluded: Collection[str]
    time_limit_s: float | None
    seed: int
    objective: Callable[[Plan], float] | None


def make_plan(topology: Topology, profile: ModelProfile, *, batch_size: int, **choices: Unpack[Choices]) -> Plan:
    """Return the fastest plan found, with its prediction; the profile says the microbatch size.

    `find_plan` says what may be chosen, and returns what the search learned beside the plan.
    """
    return find_plan(topology, profile, batch_size=batch_size, **choices).plan


def find_plan(
    topology: Topology,
    profile: ModelProfile,
    *,
    batch_size: int,
    model: str = "model",
    num_stages: int | None = None,
    num_replicas: int | None = None,
    num_lanes: int | None = None,
    schedule: ScheduleKind = "1f1b",
    max_in_flight: Sequence[int] | None = None,
    forward_codec: str = "raw:fp32",
    backward_codec: str = "raw:fp32",
    gradient_codec: str = "raw:fp32",
    bucket_bytes: int | None = None,
    max_codec_error: float | None = None,
    buffer_bytes: int = 0,
    pinned: Mapping[str, int] | None = None,
    excluded: Collection[str] = (),
    time_limit_s: float | None = None,
    seed: int = 0,
    objective: Callable[[Plan], float] | None = None,
) -> Search:
    """Search for the best plan; numbers of stages and replicas that are not given are searched for too.

    `pinned` gives workers the stage that they must hold; `excluded` workers take no part. `objective` ranks plans (with
    predictions) instead of their step time. The same inputs and seed give the same plan, unless `time_limit_s` ends the
    search early. Raises PlanError where workers, layers, lanes or memory don't suffice.
    """
    request = Request(
        profile=profile,
        batch_size=batch_size,
        model=model,
        num_lanes=num_lanes,
        schedule=schedule,
        max_in_flight=None if max_in_flight is None else tuple(max_in_flight),
        forward_codec=forward_codec,
        backward_codec=backward_codec,
        gradient_codec=gradient_codec,
        bucket_bytes=bucket_bytes,
        max_codec_error=max_codec_error,
        buffer_bytes=buffer_bytes,
        pinned=dict(pinned or {}),
    )
    until_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    return _Solver(topology, request, (num_stages, num_replicas), excluded, objective, seed, until_s).search()


def naive_plan(
    topology: Topology,
    profile: ModelProfile,
    *,
    batch_size: int,
    num_stages: int | None = None,
    num_replicas: int | None = None,
    **choices: Any,
) -> Plan:
    """Return what one would write by hand: the file's order, layers and lanes split evenly, 1F1B's own depth.

    Where no number of stages is given it is the least with which the plan fits. `choices` are those of `find_plan` that
    say what is run (codecs, lanes, schedule).
    """
    request = Request(profile=profile, batch_size=batch_size, **choices)
    found = _Solver(topology, request, (num_stages, num_replicas)).naive()
    if isinstance(found, str):
        raise PlanError(found)
    return found.model_copy(update={"prediction": predict(found, topology, profile)})


def sites_together_plan(
    topology: Topology,
    profile: ModelProfile,
    *,
    batch_size: int,
    num_stages: int | None = None,
    num_replicas: int | None = None,
    **choices: Any,
) -> Plan:
    """Return the best plan that lays out site after site, as pipelines or as stages, with layers and lanes dealt well.

    `choices` are those of `find_plan` that say what is run (codecs, lanes, schedule).
    """
    request = Request(profile=profile, batch_size=batch_size, **choices)
    solver = _Solver(topology, request, (num_stages, num_replicas))
    found = solver.together()
    if found is None:
        raise PlanError("no plan that keeps sites together fits into memory; let the workers be mixed: make_plan")
    return solver.player.predicted(found[1])


class _Solver:
    """One request, on its way to a plan."""

    def __init__(
        self,
        topology: Topology,
        request: Request,
        shape: tuple[int | None, int | None],
        excluded: Collection[str] = (),
        objective: Objective | None = None,
        seed: int = 0,
        until_s: float | None = None,
    ) -> None:
        _check_depths(request, shape[0])
        _check_split(request)
        self.request, self.topology = request, topology
        names = _participants(topology, request, excluded)
        _check_workers(len(names), shape)
        self.network = make_network(topology, names)
        deck = make_deck(request.batch_size, request.profile.microbatch_size, request.num_lanes, shape[1])
        self.shapes = shapes_to_try(request, self.network, deck, *shape)
        self.searcher = Searcher(request, self.network, deck, seed, until_s)
        self.player = Player(topology, request.profile, Drafter(request, topology, self.network, deck), objective)

    def search(self) -> Search:
        """Search, play the finalists, improve the winner."""
        candidates = self.searcher.run(self.shapes, self.player.objective is not None)
        finalists = [*self._finalists(candidates), *self._looked_for()]
        played = self._played(finalists) or self._played(candidates)
        together = self.together()
        plans = self._improved(played) + ([together] if together else [])
        naive = self.naive([*(_shape(best) for _, best in sorted(plans, key=_score)[:1]), *self._naive_shapes()])
        if isinstance(naive, Plan):
            plans.append((self.player.score(naive), naive))
        if not plans:
            raise PlanError(self._shortage(candidates))
        plans.sort(key=_score)
        plan = self.player.predicted(plans[0][1])
        return Search(
            plan=plan,
            naive=self.player.predicted(naive) if isinstance(naive, Plan) else None,
            together=self.player.predicted(together[1]) if together else None,
            others=tuple(other for _, other in plans[1:] if _shape(other) != _shape(plan)),
            left_out=tuple(name for name in self.network.names if name not in plan.workers),
            notes=tuple(self._notes(plan, plans)),
        )

    def _played(self, candidates: Sequence[Candidate]) -> list[tuple[float, Plan, Candidate]]:
        """Return the plans of placements that fit into memory, with their scores."""
        found = zip(self._at_depths(candidates), candidates, strict=True)
        return [(*scored, one) for scored, one in found if scored is not None]

    def _at_depths(self, candidates: Sequence[Candidate]) -> list[tuple[float, Plan] | None]:
        """Return each one's best plan; an objective of the user's is asked one at a time."""
        best = partial(self.player.best_depths, is_brief=self._is_large)
        if self._is_large and self.player.objective is None:
            return on_all_processors(best, candidates)
        return list(map(best, candidates))

    @property
    def _num_finalists(self) -> int:
        return _FINALISTS // 2 if self._is_large else _FINALISTS

    @property
    def _is_large(self) -> bool:
        return self.network.num_workers > PLAIN_WORKERS

    def _finalists(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the best candidates, at least one of each shape that might matter."""
        by_shape: dict[tuple[int, int], Candidate] = {}
        for one in candidates:
            by_shape.setdefault(one.shape, one)
        firsts = list(by_shape.values())
        rest = [one for one in candidates if one not in firsts]
        return firsts if self.player.objective else [*firsts, *rest][: self._num_finalists]

    def _looked_for(self) -> list[Candidate]:
        """Return, for few workers short of memory, the placements with the least bounds."""
        if self.network.num_workers > MOST_WORKERS or not self.searcher.is_short_of_memory:
            return []
        return [
            self.searcher.placed(placement)
            for shape in self.shapes
            for placement in likely_placements(
                self.topology, self.request, self.network, self.player, shape,
                deal_evenly(self.searcher.deck.units, shape[1]), _FINALISTS,
            )
        ]  # fmt: skip

    def together(self) -> tuple[float, Plan] | None:
        """Return the best plan that keeps sites together, with its score."""
        orders = self.searcher.site_orders()[: 2 * self._num_finalists]
        starts = [own[0] for own in self.searcher.starts(self.shapes, orders)]
        dealt = [self.searcher.cut_anew(self.searcher.dealt(one)) for one in starts[: 2 * self._num_finalists]]
        best = sorted(dealt, key=lambda one: one.price)[: self._num_finalists // 2]
        return min(filter(None, self._at_depths(best)), key=_score, default=None)

    def naive(self, shapes: Sequence[tuple[int, int]] | None = None) -> Plan | str:
        """Return the plan of the first shape that fits when nothing is searched for, or why none fits."""
        why = ""
        for num_stages, num_replicas in shapes or self._naive_shapes():
            order = range(self.network.num_workers)
            start = self.searcher.start((num_stages, num_replicas), order, "pipelines")
            most = max(self.player.drafter.counts(start.units))
            own = default_in_flight(self.request.schedule, num_stages, most)
            drafter, depths = self.player.drafter, self.request.max_in_flight or own
            for plan in (drafter.plan(start.placement, depths), *drafter.plans(start.placement, depths)):
                why = self.player.shortage(plan) or ""
                if not why:
                    return plan
        return why

    def _naive_shapes(self) -> list[tuple[int, int]]:
        """Return the shapes with the most replicas for each number of stages."""
        most: dict[int, int] = {}
        for num_stages, num_replicas in self.shapes:
            most[num_stages] = max(num_replicas, most.get(num_stages, 0))
        return sorted(most.items())

    def _improved(self, played: Sequence[tuple[float, Plan, Candidate]]) -> list[tuple[float, Plan]]:
        """Improve the best finalists with the simulator, as far as that costs little."""
        ranked = sorted(played, key=_score)
        improved = [(score, plan) for score, plan, _ in ranked]
        for score, plan, candidate in ranked[: 1 if self._is_large else _POLISHED]:
            moved, better = polish(self.player, candidate, plan, score, _PLAYED)
            if better is not plan or self._is_large:
                improved += filter(None, [self.player.best_depths(moved)])
        return improved

    def _shortage(self, candidates: Sequence[Candidate]) -> str:
        """Say what the candidate that comes nearest to fitting lacks, at the least depth."""
        nearest = min(candidates, key=lambda one: one.price)
        drafter, placement = self.player.drafter, nearest.placement
        depths = list(drafter.depths(placement, [1] * placement.num_stages))
        *_, leanest = drafter.plans(placement, min(depths))
        return self.player.shortage(leanest) or "no plan fits into memory; add a worker"

    def _notes(self, plan: Plan, plans: Sequence[tuple[float, Plan]]) -> Iterable[str]:
        """Say who is left out, and what taking them in would cost."""
        idle = [name for name in self.network.names if name not in plan.workers]
        if not idle or plan.prediction is None:
            return
        who = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        larger = [(score, other) for score, other in plans if other.world_size > plan.world_size]
        if larger and self.player.objective is None:
            seconds, other = min(larger, key=_score)
            yield (
                f"{who} left out: the best plan found with {other.world_size} workers takes {format_time(seconds)}"
                f" a step ({format_time(plan.prediction.step_s)} without)"
            )
        else:
            yield f"{who} left out: none of the plans found is better with more than {plan.world_size} workers"


def _score(played: tuple[float, *tuple[object, ...]]) -> float:
    return played[0]


def _shape(plan: Plan) -> tuple[int, int]:
    return plan.num_stages, len(plan.replicas)


def _participants(topology: Topology, request: Request, excluded: Collection[str]) -> list[str]:
    """Return who may take part; raise PlanError for names that the topology doesn't have, or where nobody is left."""
    known = [worker.name for worker in topology.workers]
    for what, names in (("pinned", request.pinned), ("excluded", excluded)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise PlanError(f"{what} worker '{name}' is not in topology '{topology.name}'{hint}; check the name")
    both = sorted(set(request.pinned) & set(excluded))
    if both:
        raise PlanError(f"worker '{both[0]}' is both pinned and excluded; choose one")
    kept = [name for name in known if name not in set(excluded)]
    if not kept:
        raise PlanError(f"all {len(known)} workers are excluded; leave at least one")
    return kept


def _check_workers(num_workers: int, shape: tuple[int | None, int | None]) -> None:
    stages, replicas = (number or 1 for number in shape)
    if stages * replicas > num_workers:
        raise PlanError(
            f"{stages} stages × {replicas} replicas need {stages * replicas} workers ({num_workers} may take part);"
            " lower one of them"
        )


def _check_split(request: Request) -> None:
    """Raise PlanError where the backward is to be split and the profile doesn't know what of it may wait."""
    if request.schedule == "zero_bubble" and not any(layer.weight_flops for layer in request.profile.layers):
        raise PlanError(
            "the profile doesn't say what gradients of weights take (weight_flops), so zero_bubble can't be planned;"
            " measure it anew with 'wantrain profile', or use 1f1b"
        )


def _check_depths(request: Request, num_stages: int | None) -> None:
    asked = request.max_in_flight
    if asked is None:
        return
    if request.schedule not in WITH_DEPTH or len(asked) != (num_stages or len(asked)) or not asked or min(asked) < 1:
        raise PlanError(
            f"max_in_flight is {num_stages or len(asked)} numbers above zero, for schedule {' or '.join(WITH_DEPTH)}"
            f" (got {list(asked)} for {request.schedule}); leave it out to have it chosen"
        )
