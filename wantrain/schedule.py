"""What each rank does, in which order: the list that the simulator and the executor both play.

An Action is one thing a rank does by itself. Sends and receives are not listed: they follow from the data. A tensor is
sent as soon as it exists and the link is free; every receive is posted ahead of need.

Three orders for 3 stages and 4 microbatches (rows are ranks, time runs to the right):

    gpipe                          1f1b                           1f1b, max_in_flight = 4 3 1
    F0 F1 F2 F3          B0 ...    F0 F1 F2 B0 F3 B1 B2 B3        F0 F1 F2 F3 B0 B1 B2 B3
       F0 F1 F2 F3    B0 B1 ...       F0 F1 B0 F2 B1 F3 B2 B3        F0 F1 F2 B0 F3 B1 B2 B3
          F0 F1 F2 F3 B0 B1 B2 B3        F0 B0 F1 B1 F2 B2 F3 B3        F0 B0 F1 B1 F2 B2 F3 B3

With `max_in_flight` a rank runs further ahead before its first backward. On a slow link the first gradient comes back
late; whoever has forwards left to do meanwhile does not wait for it. Every microbatch in flight costs the memory of its
stored activations, so the plan chooses the depth.

zero_bubble splits the backward. B makes the gradient that the stage before waits for, W those of the weights, which
nobody waits for: they fill the time in which a rank would wait. A stage may leave `max_postponed` of them for later;
with the default every stage holds as many microbatches as the first, which has none to leave:

    F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3
       F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
          F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

1F1B: Narayanan et al., "PipeDream", SOSP 2019. GPipe: Huang et al., NeurIPS 2019. The split backward, and as many
microbatches held on every stage: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024 (ZB-H1); theirs has 1F1B's
depth, here it may be any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator

from wantrain.errors import PlanError, did_you_mean

Kind = Literal["F", "B", "W", "R", "S"]
SCHEDULES = ("gpipe", "1f1b", "zero_bubble")
WITH_DEPTH = ("1f1b", "zero_bubble")
"""Schedules whose depth may be chosen."""

KIND_NAMES: dict[str, str] = {"F": "forward", "B": "backward", "W": "weights", "R": "reduce", "S": "step"}


class Action(NamedTuple):
    """One thing a rank does: forward or backward of a microbatch, or reduce and step at the end (microbatch -1).

    Where a stage has W, gradients of weights, its B makes those of inputs alone.
    """

    stage: int
    kind: Kind
    microbatch: int = -1

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"


Schedule = tuple[tuple[Action, ...], ...]
"""The ordered actions of each stage's rank, in one replica."""


MakeSchedule = Callable[[int, int], Sequence[str]]
"""From numbers of stages and microbatches to each stage's order, a text of F, B and perhaps W; each by microbatch."""

_OWN: dict[str, MakeSchedule] = {}


def register_schedule(name: str, make: MakeSchedule) -> None:
    """Make a schedule known by name, for plans and run files that are read in this process from here on.

    `make` is given the numbers of stages and of microbatches, and returns for each stage its order as a text:
    "FFBFBB" is 0 and 1 forward, 0 backward, 2 forward, 1 and 2 backward. A stage whose text has a W for each microbatch
    makes gradients of weights there. Depth is the schedule's own affair then, and `max_in_flight` and `max_postponed`
    follow from it. Registering a name again replaces it; raises PlanError for one of wantrain's own.
    """
    if name in SCHEDULES or not name.isidentifier():
        raise PlanError(f"a schedule can't be called '{name}'; choose another name, of letters, digits and '_'")
    _OWN[name] = make


def unregister_schedule(name: str) -> None:
    """Forget a registered schedule."""
    del _OWN[name]


def is_own(name: str) -> bool:
    """Say whether a schedule was registered, so that its depth is its own affair."""
    return name in _OWN


def _known(name: str) -> str:
    known = (*SCHEDULES, *_OWN)
    if name not in known:
        raise ValueError(
            f"unknown schedule '{name}'{did_you_mean(name, known)}; expected one of {', '.join(known)},"
            " or one that this process has registered"
        )
    return name


ScheduleKind = Annotated[str, AfterValidator(_known)]
"""The name of a schedule."""


def default_in_flight(kind: ScheduleKind, num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each stage holds at once when nothing else is asked."""
    if is_own(kind):
        return tuple(map(peak_in_flight, _own_schedule(kind, num_stages, num_microbatches)))
    if kind == "gpipe":
        return (num_microbatches,) * num_stages
    return tuple(min(num_microbatches, num_stages - stage) for stage in range(num_stages))


def default_postponed(kind: ScheduleKind, num_microbatches: int, max_in_flight: Sequence[int]) -> tuple[int, ...]:
    """Return how many gradients of weights each stage leaves for later when nothing else is asked."""
    if is_own(kind):
        return tuple(map(peak_postponed, _own_schedule(kind, len(max_in_flight), num_microbatches)))
    if kind != "zero_bubble":
        return (0,) * len(max_in_flight)
    return tuple(max_in_flight[0] - depth for depth in max_in_flight)


def make_schedule(
    kind: ScheduleKind,
    num_stages: int,
    num_microbatches: int,
    max_in_flight: Sequence[int] | None = None,
    max_postponed: Sequence[int] | None = None,
) -> Schedule:
    """List each stage's actions for one step.

    `max_in_flight` bounds, stage by stage, the microbatches whose forward is done and whose backward is not; later
    stages may not run further ahead than earlier ones, or they would wait for what never comes. `max_postponed` bounds
    likewise those whose backward is done and whose gradients of weights are not, in a zero_bubble.
    """
    try:
        _known(kind)
    except ValueError as caught:
        raise PlanError(str(caught)) from None
    if num_microbatches < 1 or num_stages < 1:
        raise PlanError(
            f"a schedule needs a stage and a microbatch (got {num_stages} stages, {num_microbatches} microbatches)"
        )
    if is_own(kind):
        return _own_schedule(kind, num_stages, num_microbatches)
    if kind == "gpipe":
        depths = [num_microbatches] * num_stages
    else:
        depths = list(max_in_flight or default_in_flight(kind, num_stages, num_microbatches))
        _check_depths(depths, num_stages)
    depths = [min(depth, num_microbatches) for depth in depths]
    if kind == "zero_bubble":
        postponed = max_postponed or default_postponed(kind, num_microbatches, depths)
        if len(postponed) != num_stages or min(postponed) < 0:
            raise PlanError(f"max_postponed must be {num_stages} numbers, none below zero (got {list(postponed)})")
        orders = [_split_order(num_microbatches, *bounds) for bounds in zip(depths, postponed, strict=True)]
    else:
        orders = ["F" * depth + "BF" * (num_microbatches - depth) + "B" * depth for depth in depths]
    return tuple(_numbered(stage, order) for stage, order in enumerate(orders))


def _own_schedule(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    """Return a registered schedule's actions; raise PlanError where it leaves something out or waits for ever."""
    orders = list(_OWN[name](num_stages, num_microbatches))
    if len(orders) != num_stages:
        raise PlanError(f"schedule '{name}' has {len(orders)} stages (expected {num_stages}); return a text for each")
    for stage, order in enumerate(orders):
        if sorted(order) not in (sorted("FB" * num_microbatches), sorted("FBW" * num_microbatches)):
            counts = ", ".join(f"{order.count(sign)} {sign}" for sign in "FBW")
            raise PlanError(
                f"schedule '{name}' has {counts} among {len(order)} actions of stage {stage} (expected"
                f" {num_microbatches} F, as many B, as many W or none, and nothing else)"
            )
    _check_progress(name, orders)
    return tuple(_numbered(stage, order) for stage, order in enumerate(orders))


def _check_progress(name: str, orders: Sequence[str]) -> None:
    """Play the orders against each other: a forward needs the stage before it, a backward the one behind it."""
    done = [{"F": 0, "B": 0, "W": 0} for _ in orders]
    last = len(orders) - 1

    def can_go_on(stage: int) -> bool:
        own = done[stage]
        at = sum(own.values())
        if at == len(orders[stage]):
            return False
        if orders[stage][at] == "F":
            return stage == 0 or done[stage - 1]["F"] > own["F"]
        if orders[stage][at] == "W":
            return own["B"] > own["W"]
        return own["F"] > own["B"] and (stage == last or done[stage + 1]["B"] > own["B"])

    while any(sum(own.values()) < len(order) for own, order in zip(done, orders, strict=True)):
        ready = [stage for stage in range(len(orders)) if can_go_on(stage)]
        if not ready:
            at = {stage: order[: sum(done[stage].values()) + 1] for stage, order in enumerate(orders)}
            raise PlanError(f"schedule '{name}' can't go on: all stages wait for others (after {at}); mend the order")
        for stage in ready:
            done[stage][orders[stage][sum(done[stage].values())]] += 1


def _numbered(stage: int, order: str) -> tuple[Action, ...]:
    kinds: tuple[Kind, ...] = ("F", "B", "W")
    counts = {kind: itertools.count() for kind in kinds}
    actions = [Action(stage, kind, next(counts[kind])) for sign in order for kind in kinds if kind == sign]
    return (*actions, Action(stage, "R"), Action(stage, "S"))


def _check_depths(depths: Sequence[int], num_stages: int) -> None:
    if len(depths) != num_stages or min(depths) < 1 or any(a < b for a, b in itertools.pairwise(depths)):
        raise PlanError(
            f"max_in_flight must be {num_stages} numbers above zero that do not grow from stage to stage"
            f" (got {list(depths)})"
        )


def _split_order(num_microbatches: int, depth: int, postponed: int) -> str:
    """Return a stage's order where gradients of weights wait until there is nothing better to do.

    While there are forwards left, only those are made that exceed `postponed`. From the last forward on one goes
    between two backwards: more would hold up what the stages before wait for (8 × 32 at 100 ms, played: 7 % with two).
    """
    left = num_microbatches - depth
    num_now = max(0, left - postponed)
    first = "BF" * (left - num_now) + "BWF" * num_now
    return "F" * depth + first + "BW" * depth + "W" * (left - num_now)


def splits_backward(actions: Iterable[Action]) -> bool:
    """Say whether a stage makes gradients of weights apart from those of inputs."""
    return any(action.kind == "W" for action in actions)


def peak_postponed(actions: Sequence[Action]) -> int:
    """Return the greatest number of gradients of weights that wait while the stage does something else."""
    waiting = peak = 0
    for action in actions if splits_backward(actions) else ():
        if action.kind in "FB":
            peak = max(peak, waiting)
        waiting += {"B": 1, "W": -1}.get(action.kind, 0)
    return peak


def peak_in_flight(actions: Sequence[Action]) -> int:
    """Return the greatest number of microbatches whose forward is done and whose backward is not."""
    held = peak = 0
    for action in actions:
        held += {"F": 1, "B": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak
