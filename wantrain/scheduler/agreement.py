"""How a step ends: no rank updates its weights before it has heard every other's gradient norm.

The norms go straight from every rank to every other, so each waits for the last word to arrive: one latency. A step
that follows another begins where the first stage's ranks begin it; all else waits for their first microbatch anyway.
With x_a the begin of replica a's first rank, r_q a rank's readiness after its replica's begin, u_a an update's seconds:

    x'_b = max over a, q in a of (x_a + r_q + latency from q to b's first rank) + u_b

The step takes what x grows by when this is repeated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wantrain.plan import Plan
from wantrain.scheduler.routes import ground
from wantrain.topology import Topology

_ROUNDS = 8
"""Chosen: replicas whose begins drift apart settle within a few steps."""

Floats = NDArray[np.float64]


class Agreement:
    """The agreement of a plan's ranks on a topology."""

    def __init__(self, plan: Plan, topology: Topology) -> None:
        known = ground(topology)
        workers = [known.number_of[name] for name in plan.workers]
        self._class_of, self._latency_s = known.class_of[workers], known.latency_s
        self._num_stages = plan.num_stages

    def agreed_s(self, ready_s: Floats) -> Floats:
        """Return when each rank has heard all others, given when each was ready."""
        last, second = self._last_by_class(ready_s)
        heard = (last[:, None] + self._latency_s).T  # by the class of who hears, then of who speaks
        own = np.where(ready_s == last[self._class_of], second[self._class_of], last[self._class_of])
        heard = heard[self._class_of]
        ranks = np.arange(len(ready_s))
        heard[ranks, self._class_of] = own + self._latency_s[self._class_of, self._class_of]
        agreed: Floats = np.maximum(ready_s, heard.max(axis=1))
        return agreed

    def period_s(self, ready_s: Floats, update_s: Floats) -> float:
        """Return how long a step takes when such steps follow each other."""
        firsts = np.arange(0, len(ready_s), self._num_stages)
        latency_s = self._latency_s[self._class_of[:, None], self._class_of[firsts]]
        latency_s[firsts, np.arange(len(firsts))] = 0.0  # a rank knows its own at once
        told_s = (ready_s[:, None] + latency_s).reshape(len(firsts), self._num_stages, len(firsts)).max(axis=1)
        begin_s = np.zeros(len(firsts))
        for _ in range(_ROUNDS):
            before_s, begin_s = begin_s, (begin_s[:, None] + told_s).max(axis=0) + update_s[firsts]
        return float((begin_s - before_s).max())

    def _last_by_class(self, ready_s: Floats) -> tuple[Floats, Floats]:
        """Return for each class when the last of its ranks is ready, and the last but one; -inf for none."""
        num_classes = len(self._latency_s)
        last, second = np.full(num_classes, -np.inf), np.full(num_classes, -np.inf)
        for number, seconds in zip(self._class_of.tolist(), ready_s.tolist(), strict=True):
            if seconds > last[number]:
                last[number], second[number] = seconds, last[number]
            elif seconds > second[number]:
                second[number] = seconds
        return last, second
