"""What each rank does, in which order: the list that the simulator and the executor both play.

An Action is one thing a rank does by itself. Sends and receives are not listed: they follow from the data. A tensor is
sent as soon as it exists and the link is free; every receive is posted ahead of need.

Three schedules for 3 stages and 4 microbatches (rows are ranks, time runs to the right):

    gpipe                          1f1b                           1f1b, max_in_flight = 4 3 1
    F0 F1 F2 F3          B0 ...    F0 F1 F2 B0 F3 B1 B2 B3        F0 F1 F2 F3 B0 B1 B2 B3
       F0 F1 F2 F3    B0 B1 ...       F0 F1 B0 F2 B1 F3 B2 B3        F0 F1 F2 B0 F3 B1 B2 B3
          F0 F1 F2 F3 B0 B1 B2 B3        F0 B0 F1 B1 F2 B2 F3 B3        F0 B0 F1 B1 F2 B2 F3 B3

With `max_in_flight` a rank runs further ahead before its first backward. On a slow link the first gradient comes back
late; whoever has forwards left to do meanwhile does not wait for it. Every microbatch in flight costs the memory of its
stored activations, so the plan chooses the depth.

1F1B: Narayanan et al., "PipeDream", SOSP 2019. GPipe: Huang et al., NeurIPS 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from wantrain.errors import PlanError, did_you_mean

Kind = Literal["F", "B", "R", "S"]
ScheduleKind = Literal["gpipe", "1f1b"]

KIND_NAMES: dict[str, str] = {"F": "forward", "B": "backward", "R": "reduce", "S": "step"}


class Action(NamedTuple):
    """One thing a rank does: forward or backward of a microbatch, or reduce and step at the end (microbatch -1)."""

    stage: int
    kind: Kind
    microbatch: int = -1

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"


Schedule = tuple[tuple[Action, ...], ...]
"""The ordered actions of each stage's rank, in one replica."""


def default_in_flight(kind: ScheduleKind, num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each stage holds at once when nothing else is asked."""
    if kind == "gpipe":
        return (num_microbatches,) * num_stages
    return tuple(min(num_microbatches, num_stages - stage) for stage in range(num_stages))


def make_schedule(
    kind: ScheduleKind, num_stages: int, num_microbatches: int, max_in_flight: Sequence[int] | None = None
) -> Schedule:
    """List each stage's actions for one step.

    `max_in_flight` bounds, stage by stage, the microbatches whose forward is done and whose backward is not; later
    stages may not run further ahead than earlier ones, or they would wait for what never comes.
    """
    if kind not in get_args(ScheduleKind):
        raise PlanError(f"unknown schedule '{kind}'{did_you_mean(kind, get_args(ScheduleKind))}")
    if num_microbatches < 1 or num_stages < 1:
        raise PlanError(
            f"a schedule needs a stage and a microbatch (got {num_stages} stages, {num_microbatches} microbatches)"
        )
    if kind == "gpipe":
        depths = [num_microbatches] * num_stages
    else:
        depths = list(max_in_flight or default_in_flight(kind, num_stages, num_microbatches))
        _check_depths(depths, num_stages)
    return tuple(
        _rank_actions(stage, num_microbatches, min(depth, num_microbatches)) for stage, depth in enumerate(depths)
    )


def _check_depths(depths: Sequence[int], num_stages: int) -> None:
    if len(depths) != num_stages or min(depths) < 1 or any(a < b for a, b in itertools.pairwise(depths)):
        raise PlanError(
            f"max_in_flight must be {num_stages} numbers above zero that do not grow from stage to stage"
            f" (got {list(depths)})"
        )


def _rank_actions(stage: int, num_microbatches: int, depth: int) -> tuple[Action, ...]:
    forwards = [Action(stage, "F", m) for m in range(num_microbatches)]
    backwards = [Action(stage, "B", m) for m in range(num_microbatches)]
    actions = forwards[:depth]
    for backward, forward in zip(backwards, forwards[depth:], strict=False):
        actions += [backward, forward]
    actions += backwards[num_microbatches - depth :]
    return (*actions, Action(stage, "R"), Action(stage, "S"))


def peak_in_flight(actions: Sequence[Action]) -> int:
    """Return the greatest number of microbatches whose forward is done and whose backward is not."""
    held = peak = 0
    for action in actions:
        held += {"F": 1, "B": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak
