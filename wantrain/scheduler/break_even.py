"""The link speed under which a codec pays: where the step takes as long with it as without.

Below that speed the bytes that it saves take longer than its arithmetic, above it is the other way round. Both steps
are played by the simulator, with every link at the same speed, so that pipelining and overlap count: a codec that works
while the stage computes costs nothing until it is what everybody waits for.
"""

from __future__ import annotations

import math

from wantrain.errors import PlanError, TopologyError
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import predict
from wantrain.topology import Topology

_SLOWEST, _FASTEST = 1e5, 1e12
"""Bytes per second between which the speed is looked for: 0.8 Mbit/s to 8 Tbit/s."""

_ROUNDS = 40
"""Of bisection on the logarithm: to less than a millionth."""

_WORTH = 1.002
"""Chosen: a step shorter by less than two thousandths doesn't pay."""


def break_even_bytes_per_s(plan: Plan, topology: Topology, profile: ModelProfile) -> float:
    """Return the rate of all links below which the plan's codecs shorten the step, infinite where they always do.

    0 where they never do. Raise TopologyError where a worker's codec speed is unknown: then nothing would be weighed.
    """
    for name in plan.workers:
        if topology.worker(name).codec_values_per_s is None:
            raise TopologyError(f"how fast worker '{name}' encodes is not known; measure it with 'wantrain profile'")
    if plan.codecs <= {"raw:fp32"}:
        raise PlanError("the plan's codecs are all raw:fp32; give those that are to be weighed with --codec")
    raw = _raw(plan)

    def pays(rate: float) -> bool:
        there = _at_rate(topology, rate)
        return predict(plan, there, profile).step_s * _WORTH < predict(raw, there, profile).step_s

    if not pays(_SLOWEST):
        return 0.0
    if pays(_FASTEST):
        return math.inf
    low, high = math.log(_SLOWEST), math.log(_FASTEST)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _raw(plan: Plan) -> Plan:
    plain = {"forward_codec": "raw:fp32", "backward_codec": "raw:fp32"}
    boundaries = tuple(boundary.model_copy(update=plain) for boundary in plan.boundaries)
    return plan.model_copy(update={"boundaries": boundaries, "gradient_codec": "raw:fp32"})


def _at_rate(topology: Topology, rate: float) -> Topology:
    """Return the topology with every link at one rate and no shared lines."""
    free = {"uplink_bytes_per_s": None, "downlink_bytes_per_s": None}
    rules = tuple(rule.model_copy(update={"bandwidth_bytes_per_s": rate}) for rule in topology.rules)
    workers = tuple(worker.model_copy(update=free) for worker in topology.workers)
    return topology.model_copy(update={"rules": rules, "workers": workers, "sites": ()})
