"""What can go otherwise than planned: slow workers, late payloads, workers that are gone, sends that hold up computing.

All of it is frozen and seeded: the same disturbance gives the same step, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from wantrain.errors import PlanError, RunError
from wantrain.plan import Plan
from wantrain.topology import Topology


@dataclass(frozen=True)
class Disturbance:
    """How a step is played; as it stands nothing is disturbed."""

    slow: Mapping[str, float] = field(default_factory=dict)
    """How many times longer a worker computes."""
    jitter_seed: int | None = None
    """Payloads are late by their link's `jitter_s` times a normal deviate, but never early nor out of order."""
    gone_at_s: Mapping[str, float] = field(default_factory=dict)
    """When a worker ends; what it has not finished by then is lost."""
    has_blocking_sends: bool = False
    """A rank computes on only once what it made has left, as in `torch.distributed.pipelining` and DT-FM."""
    overlaps_gradients: bool = True
    """Buckets are handed in while the last backward goes on; else all together at its end."""

    def check(self, plan: Plan, topology: Topology) -> None:
        """Raise PlanError where this does not fit the plan or the topology."""
        for name, factor in self.slow.items():
            _check_worker(name, plan)
            if not 0 < factor < math.inf:
                raise PlanError(f"worker '{name}' can't be {factor:g} times as slow; give a number above zero")
        for name, time_s in self.gone_at_s.items():
            _check_worker(name, plan)
            if not 0 <= time_s < math.inf:
                raise PlanError(f"worker '{name}' can't be gone at {time_s:g} s; give a time of the step")
        if self.jitter_seed is not None and not any(rule.jitter_s for rule in topology.rules):
            raise PlanError(f"no link of topology '{topology.name}' has jitter; add jitter = \"5 ms\" to a [[link]]")


CALM = Disturbance()
"""Nothing is disturbed."""


class StandstillError(RunError):
    """A step that never ends; `waits` tells which worker waits for which, and what for."""

    def __init__(self, waits: Mapping[str, tuple[str, str]], gone_at_s: Mapping[str, float]) -> None:
        self.waits = dict(waits)
        gone = ", ".join(f"'{name}' is gone at {time_s:g} s" for name, time_s in gone_at_s.items())
        told = [f"'{name}' waits for '{other}' ({what})" for name, (other, what) in self.waits.items()]
        more = [f"{len(told) - _MOST_TOLD} more wait"] if len(told) > _MOST_TOLD else []
        super().__init__(f"the step never ends: {'; '.join([gone, *told[:_MOST_TOLD], *more])}")


_MOST_TOLD = 8
"""Chosen: more waits than this are no line any more."""


def _check_worker(name: str, plan: Plan) -> None:
    if name not in plan.workers:
        raise PlanError(f"the plan has no worker '{name}' (it has {', '.join(plan.workers)})")
