"""A new plan for a network that has changed: nearly as good as the best, with few bytes to move.

A worker that keeps its stage keeps its weights and its optimizer's state; what it takes over must come from another.
So beside the plan as it was and the best plan found afresh, plans are made in which workers are pinned to the stages
that they have: all of them, and all but those that would gain most by moving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wantrain.errors import PlanError
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import ADAMW_STATES, predict
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology
from wantrain.units import format_bytes, format_time

NEAR = 1.03
"""Chosen: a plan is good enough within 3 % of the best that was found."""

_MOST_UNPINNED = 4


@dataclass(frozen=True)
class Replan:
    """The plan to go on with, and what getting there takes."""

    plan: Plan
    moved_bytes: int
    """Weights and optimizer states of layers that a worker holds now and did not hold before."""
    fresh: Plan
    fresh_moved_bytes: int
    old_step_s: float | None
    """The old plan's step on the changed network; None where it has lost a worker."""

    @property
    def summary(self) -> str:
        """Say in a line what changes."""
        before = "can't run any more" if self.old_step_s is None else f"takes {format_time(self.old_step_s)} now"
        return (
            f"the old plan {before}; this one takes {format_time(_step_s(self.plan))} and moves"
            f" {format_bytes(self.moved_bytes)} (made afresh: {format_time(_step_s(self.fresh))},"
            f" {format_bytes(self.fresh_moved_bytes)})"
        )


def replan(old: Plan, topology: Topology, profile: ModelProfile, **choices: Any) -> Replan:
    """Return the plan within 3 % of the best found that moves the fewest bytes.

    `choices` are make_plan's, batch_size and the codecs among them; the shape may change. Raise PlanError where
    nothing fits any more.
    """
    fresh = make_plan(topology, profile, **choices)
    candidates = [fresh, *_near(old, fresh, topology, profile, choices)]
    best_s = min(_step_s(one) for one in candidates)
    good = [one for one in candidates if _step_s(one) <= NEAR * best_s]
    chosen = min(good, key=lambda one: (moved_bytes(old, one, profile), _step_s(one)))
    before = _played(old, topology, profile)
    return Replan(
        plan=chosen,
        moved_bytes=moved_bytes(old, chosen, profile),
        fresh=fresh,
        fresh_moved_bytes=moved_bytes(old, fresh, profile),
        old_step_s=None if before is None else _step_s(before),
    )


def moved_bytes(old: Plan, new: Plan, profile: ModelProfile) -> int:
    """Return the bytes of weights and optimizer states that workers must fetch to go from one plan to another."""
    held = _layers_by_worker(old)
    return sum(
        (1 + ADAMW_STATES) * profile.layers[layer].parameter_bytes + profile.layers[layer].frozen_bytes
        for worker, layers in _layers_by_worker(new).items()
        for layer in layers - held.get(worker, set())
    )


def _near(
    old: Plan, fresh: Plan, topology: Topology, profile: ModelProfile, choices: Mapping[str, Any]
) -> Iterator[Plan]:
    """Yield plans that leave most where it is."""
    unchanged = _played(old, topology, profile)
    if unchanged is not None:
        yield unchanged
    there = {worker.name for worker in topology.workers}
    stages = {name: old.stage_of(rank) for rank, name in enumerate(old.workers) if name in there}
    asked = dict(choices) | {"num_stages": old.num_stages}
    moved = [name for name in fresh.workers if stages.get(name) != fresh.stage_of(fresh.rank_of(name))]
    for free in range(min(len(moved), _MOST_UNPINNED) + 1):
        pinned = {name: stage for name, stage in stages.items() if name not in moved[:free]}
        try:
            yield make_plan(topology, profile, **(asked | {"pinned": pinned}))
        except PlanError:  # what is pinned has no place any more: another candidate may
            continue


def _played(plan: Plan, topology: Topology, profile: ModelProfile) -> Plan | None:
    """Return the plan with its prediction on this topology; None where a worker of it is gone."""
    if not set(plan.workers) <= {worker.name for worker in topology.workers}:
        return None
    return plan.model_copy(update={"prediction": predict(plan, topology, profile)})


def _layers_by_worker(plan: Plan) -> dict[str, set[int]]:
    spans = [set(range(stage.first_layer, stage.end_layer)) for stage in plan.stages]
    return {name: spans[plan.stage_of(rank)] for rank, name in enumerate(plan.workers)}


def _step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s
