"""Play a plan in virtual time: the same actions that the executor plays, over links that are modelled.

Model. A rank does one action at a time, in the listed order, and waits only for the tensor that the next one needs. A
payload leaves when its tensor exists, is encoded, and every line on its way is free: the link itself and the uplinks
and downlinks of worker and site, in first-come order. So a middle stage that sends both ways through one uplink pays
for both. Gradient buckets leave as the last backward passes their layers, one piece at a time and behind whatever the
pipeline sends, so that a pipeline payload never waits behind more than one piece.

    rank 1   ──[F0]──[F1]──.......──[B0]──        compute; dots: waiting for 2B0
    uplink        └─F0──┘└─F1──┘        └─B0──┘   one payload after another

A bucket is reduced straight between the members of a data group: each owns one piece of it, gets the others' copies of
that (scatter), and sends the sum to all (gather).

Exact: the events are played one by one (`play`), nothing is averaged. Bound checked in the tests: no play is ever
faster than the work-conserving bound of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wantrain.plan import Plan
from wantrain.scheduler.agreement import Agreement
from wantrain.scheduler.disturbance import CALM, Disturbance, StandstillError
from wantrain.scheduler.layout import lay_out
from wantrain.scheduler.native import compiled
from wantrain.scheduler.play import HELPERS, play
from wantrain.scheduler.played import PlayedStep
from wantrain.scheduler.script import (
    ACTIONS,
    BACKWARD,
    END_ACTION,
    FINISH_S,
    FORWARD,
    KIND,
    MICROBATCH,
    NEXT_ACTION,
    RANKS,
    SECONDS,
    WAITING_SINCE_S,
    Script,
)
from wantrain.scheduler.workload import Workload
from wantrain.timeline import Timeline
from wantrain.topology import Topology

__all__ = ["PlayedStep", "Workload", "play_step", "simulate", "step_s"]

_COMPILED_FROM = 10_000
"""Actions and sendings from which one play is worth machine code: measured, 11 µs each as it is and 1 µs compiled."""

_COMPILED_AFTER = 500_000
"""Actions and sendings after which a process that plays ever again is better off with machine code: chosen, that is
five seconds as it is, where loading what is kept takes one, and compiling it the first time more than ten."""


class _Player:
    """Plays scripts, small ones as they are; whoever plays many gets machine code for them too."""

    def __init__(self) -> None:
        self._num_played = 0

    def play(self, script: Script) -> Script:
        """Play to the end and return the script as it then stands."""
        self._num_played += script.num_steps
        if script.num_steps < _COMPILED_FROM and self._num_played < _COMPILED_AFTER:
            script = script.as_lists()
            play(script.ints, script.floats)
        else:
            compiled(play, *HELPERS)(script.ints, script.floats)
        return script


_player = _Player()


def simulate(plan: Plan, topology: Topology, workload: Workload, disturbance: Disturbance = CALM) -> Timeline:
    """Play one step of the plan in virtual time and return what happened when.

    Raises StandstillError where the step never ends, and PlanError where the disturbance doesn't fit the plan.
    """
    return play_step(plan, topology, workload, disturbance).timeline()


def play_step(plan: Plan, topology: Topology, workload: Workload, disturbance: Disturbance = CALM) -> PlayedStep:
    """Play one step and return what happened, and how long it takes when such steps follow each other.

    That is less than the timeline's span by what the last ranks to hear of the agreement lag behind the first stage.
    """
    script = _played(plan, topology, workload, disturbance, is_recorded=True)
    ends = _ends(plan, topology, workload, script)
    return PlayedStep.read(plan.workers, script, ends.step_s, ends.updated_s)


def step_s(plan: Plan, topology: Topology, workload: Workload, disturbance: Disturbance = CALM) -> float:
    """Return how long the step takes, as `play_step` plays it, without a record of what happened."""
    return _ends(plan, topology, workload, _played(plan, topology, workload, disturbance, is_recorded=False)).step_s


class _Ends(NamedTuple):
    step_s: float
    updated_s: NDArray[np.float64] | None
    """When each rank's update is through; None where they don't wait for each other."""


def _ends(plan: Plan, topology: Topology, workload: Workload, script: Script) -> _Ends:
    """Return how a step that was played ends: by itself, or by the agreement of all ranks."""
    if not workload.agrees:
        return _Ends(float(script.floats[FINISH_S]), None)
    update_s = script.column(ACTIONS, SECONDS, is_float=True)[script.column(RANKS, END_ACTION) - 1]
    ready_s = script.column(RANKS, WAITING_SINCE_S, is_float=True) - update_s  # the update is a rank's last action
    agreement = Agreement(plan, topology)
    return _Ends(agreement.period_s(ready_s, update_s), agreement.agreed_s(ready_s) + update_s)


def _played(
    plan: Plan, topology: Topology, workload: Workload, disturbance: Disturbance, *, is_recorded: bool
) -> Script:
    if disturbance is not CALM:
        disturbance.check(plan, topology)
    script = _player.play(lay_out(plan, topology, workload, disturbance, is_recorded))
    _check_ended(plan, script, disturbance)
    return script


def _check_ended(plan: Plan, script: Script, disturbance: Disturbance) -> None:
    """Raise StandstillError where ranks still have something to do; say what they wait for."""
    position = script.column(RANKS, NEXT_ACTION)
    left = script.column(RANKS, END_ACTION) - position
    if not left.any():
        return
    kinds, microbatches = script.column(ACTIONS, KIND), script.column(ACTIONS, MICROBATCH)
    waits = {}
    for rank in np.flatnonzero(left).tolist():
        if plan.workers[rank] not in disturbance.gone_at_s:
            action = position[rank]
            waits[plan.workers[rank]] = _missing(plan, rank, kinds[action], microbatches[action], left.tolist())
    raise StandstillError(waits, disturbance.gone_at_s)


def _missing(plan: Plan, rank: int, kind: int, microbatch: int, left: Sequence[int]) -> tuple[str, str]:
    """Return for whom a rank waits, and for what."""
    if kind == FORWARD:
        return plan.workers[rank - 1], f"microbatch {microbatch}"
    if kind == BACKWARD:
        return plan.workers[rank + 1], f"the gradient of microbatch {microbatch}"
    members = [member for member in plan.data_group(plan.stage_of(rank)) if member != rank]
    return plan.workers[max(members, key=lambda member: left[member])], "weight gradients"
