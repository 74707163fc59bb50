"""Make a plan: cut the layers, place the workers, choose how deep the pipeline runs ahead.

Layers are cut so that the slowest stage is as fast as can be (exact, by dynamic programming). Workers are taken in
the topology's order, in two ways: neighbours in the list form a pipeline, or neighbours hold the same stage.

    workers a b c d, 2 stages × 2 replicas
    pipelines:  replica 0 = a → b, replica 1 = c → d        good where gradients are the larger burden for far links
    stages:     replica 0 = a → c, replica 1 = b → d        good where activations are

Both are played by the simulator at several depths, and the fastest that fits into memory is the plan. Among depths
that are equally fast within 1 % it is the one that needs the least memory, or the deepest where a link is the
bottleneck.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from wantrain.errors import PlanError
from wantrain.plan import DEFAULT_BUCKET_BYTES, BoundaryPlan, Plan, ReplicaPlan, StagePlan
from wantrain.profile import ModelProfile
from wantrain.schedule import ScheduleKind, default_in_flight
from wantrain.scheduler.cost_model import predict
from wantrain.topology import Topology
from wantrain.units import format_bytes
from wantrain.wire import Transport, transport_for

SAME_WITHIN = 1.01
"""Depths whose step times differ by less count as equal: chosen, below what a measurement tells apart."""


def split_layers(costs: Sequence[float], num_stages: int) -> list[tuple[int, int]]:
    """Cut layers into consecutive stages so that the costliest stage costs least; return [first, end) of each."""
    if num_stages > len(costs):
        raise PlanError(f"{num_stages} stages need as many layers (the model has {len(costs)}); lower num_stages")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best = {(0, 0): (0.0, 0)}
    for stage in range(1, num_stages + 1):
        for end in range(stage, len(costs) + 1):
            best[stage, end] = min(
                (max(best[stage - 1, cut][0], prefix[end] - prefix[cut]), cut)
                for cut in range(stage - 1, end)
                if (stage - 1, cut) in best
            )
    spans, end = [], len(costs)
    for stage in range(num_stages, 0, -1):
        cut = best[stage, end][1]
        spans.append((cut, end))
        end = cut
    return spans[::-1]


def make_plan(
    topology: Topology,
    profile: ModelProfile,
    *,
    batch_size: int,
    model: str = "model",
    num_stages: int = 1,
    num_replicas: int = 1,
    num_lanes: int | None = None,
    schedule: ScheduleKind = "1f1b",
    max_in_flight: Sequence[int] | None = None,
    forward_codec: str = "raw:fp32",
    backward_codec: str = "raw:fp32",
    gradient_codec: str = "raw:fp32",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    max_codec_error: float | None = None,
) -> Plan:
    """Return the fastest plan found, with its prediction; the profile says the microbatch size.

    Raises PlanError where workers, layers, lanes or memory don't suffice.
    """
    needed = num_stages * num_replicas
    if needed > len(topology.workers):
        raise PlanError(
            f"{num_stages} stages × {num_replicas} replicas need {needed} workers"
            f" (topology '{topology.name}' has {len(topology.workers)})"
        )
    spans = split_layers([layer.forward_flops + layer.backward_flops for layer in profile.layers], num_stages)
    lanes = _deal_lanes(num_lanes or num_replicas, num_replicas, batch_size)
    counts = [_num_microbatches(len(own) * batch_size // sum(map(len, lanes)), profile) for own in lanes]
    candidates = []
    for order in ("pipelines", "stages"):
        placed = _place(topology, num_stages, num_replicas, order)
        for depths in _depths(schedule, num_stages, max(counts), max_in_flight):
            plan = Plan.parse(
                {
                    "topology": topology.name,
                    "model": model,
                    "num_layers": len(profile.layers),
                    "batch_size": batch_size,
                    "microbatch_size": profile.microbatch_size,
                    "num_lanes": sum(map(len, lanes)),
                    "schedule": schedule,
                    "stages": tuple(
                        StagePlan(first_layer=first, end_layer=end, max_in_flight=depth)
                        for (first, end), depth in zip(spans, depths, strict=True)
                    ),
                    "replicas": tuple(
                        ReplicaPlan(workers=workers, num_microbatches=count, lanes=own)
                        for workers, count, own in zip(placed, counts, lanes, strict=True)
                    ),
                    "boundaries": tuple(
                        BoundaryPlan(
                            forward_codec=forward_codec,
                            backward_codec=backward_codec,
                            transports=tuple(_transport(topology, row[s], row[s + 1]) for row in placed),
                        )
                        for s in range(num_stages - 1)
                    ),
                    "gradient_codec": gradient_codec,
                    "gradient_transport": _gradient_transport(topology, placed),
                    "bucket_bytes": bucket_bytes,
                    "max_codec_error": max_codec_error,
                    "under_way_bytes": _under_way_bytes(topology, placed),
                },
                PlanError,
                "plan",
            )
            prediction, _ = predict(plan, topology, profile)
            candidates.append(plan.model_copy(update={"prediction": prediction}))
    return _best(candidates, topology)


def _num_microbatches(samples: int, profile: ModelProfile) -> int:
    count, rest = divmod(samples, profile.microbatch_size)
    if rest or not count:
        raise PlanError(
            f"a replica's {samples} samples a step don't fill microbatches of {profile.microbatch_size};"
            " change batch_size, num_lanes or microbatch_size"
        )
    return count


def _deal_lanes(num_lanes: int, num_replicas: int, batch_size: int) -> list[tuple[int, ...]]:
    """Give every replica a run of lanes, as evenly as can be."""
    if batch_size % num_lanes or num_lanes < num_replicas:
        raise PlanError(
            f"{num_lanes} lanes can't be drawn from evenly by {num_replicas} replicas in batches of {batch_size};"
            " num_lanes must divide batch_size and be no less than num_replicas"
        )
    bounds = [num_lanes * i // num_replicas for i in range(num_replicas + 1)]
    return [tuple(range(first, end)) for first, end in itertools.pairwise(bounds)]


def _place(
    topology: Topology, num_stages: int, num_replicas: int, order: Literal["pipelines", "stages"] | str
) -> list[tuple[str, ...]]:
    """Return each replica's workers, in stage order."""
    names = [worker.name for worker in topology.workers[: num_stages * num_replicas]]
    if order == "pipelines":
        return [tuple(names[r * num_stages : (r + 1) * num_stages]) for r in range(num_replicas)]
    return [tuple(names[s * num_replicas + r] for s in range(num_stages)) for r in range(num_replicas)]


def _depths(
    schedule: ScheduleKind, num_stages: int, num_microbatches: int, asked: Sequence[int] | None
) -> Iterator[tuple[int, ...]]:
    """Yield depths to try: what was asked, or 1F1B's own and multiples of that."""
    if asked is not None:
        if schedule == "gpipe" or len(asked) != num_stages or min(asked) < 1:
            raise PlanError(
                f"max_in_flight is {num_stages} numbers above zero, for schedule 1f1b"
                f" (got {list(asked)} for {schedule}); leave it out to have it chosen"
            )
        yield tuple(asked)
        return
    base = default_in_flight(schedule, num_stages, num_microbatches)
    tried = set()
    for factor in (1, 2, 3, 4, 8):
        depths = tuple(min(num_microbatches, factor * depth) for depth in base)
        if depths not in tried:
            tried.add(depths)
            yield depths


def _transport(topology: Topology, source: str, target: str) -> Transport:
    """Return a transport that fills the link in both directions."""
    ways = ((source, target), (target, source))
    rate = max(topology.send_limit_bytes_per_s(*way) for way in ways)
    return transport_for(rate, max(topology.link(*way).latency_s for way in ways))


def _gradient_transport(topology: Topology, placed: Sequence[Sequence[str]]) -> Transport:
    """Return the transport of the data groups: the one that the longest, fastest pair among them needs."""
    pairs = [(a, b) for members in zip(*placed, strict=True) for a in members for b in members if a != b]
    transports = [_transport(topology, a, b) for a, b in pairs] or [Transport()]
    return max(transports, key=lambda transport: transport.window_bytes)


def _under_way_bytes(topology: Topology, placed: Sequence[Sequence[str]]) -> dict[str, int]:
    """Bound what each worker has under way where one line carries all its links: the window that fills that line."""
    partners: dict[str, set[str]] = {name: set() for row in placed for name in row}
    for line in (*placed, *zip(*placed, strict=True)):
        is_pipeline = line in placed
        for i, name in enumerate(line):
            partners[name].update(line[max(0, i - 1) : i + 2] if is_pipeline else line)
    bounds = {}
    for name, others in partners.items():
        ways = [(name, other) for other in others - {name}]
        uplinks = [rate for way in ways for (kind, _), rate in topology.shared_limits(*way) if kind == "uplink"]
        if len(ways) > 1 and uplinks and uplinks[0] < sum(topology.link(*way).bandwidth_bytes_per_s for way in ways):
            latency_s = max(topology.link(*way).latency_s for way in ways)
            bounds[name] = transport_for(uplinks[0], latency_s).window_bytes
    return bounds


def _best(candidates: Sequence[Plan], topology: Topology) -> Plan:
    """Return the fastest plan within memory; of those that are as fast the leanest, or the deepest if a link is the
    bottleneck: a real link is not as steady as the simulator's, and what is in flight makes up for it."""
    fitting = [plan for plan in candidates if _shortage(plan, topology) is None]
    if not fitting:
        raise PlanError(_shortage(candidates[0], topology) or "no plan fits")
    step_s = {id(plan): plan.prediction.step_s for plan in fitting if plan.prediction}
    fastest = min(step_s.values())
    same = [plan for plan in fitting if step_s[id(plan)] <= fastest * SAME_WITHIN]
    by_memory = sorted(same, key=lambda plan: max(plan.prediction.memory_bytes.values()) if plan.prediction else 0)
    is_bound_by_a_link = all(plan.prediction and plan.prediction.bottleneck.startswith("link") for plan in same)
    return by_memory[-1] if is_bound_by_a_link else by_memory[0]


def _shortage(plan: Plan, topology: Topology) -> str | None:
    """Say which worker has too little memory for a plan, if any."""
    assert plan.prediction is not None
    for rank, name in enumerate(plan.workers):
        needs, has = plan.prediction.memory_bytes[name], topology.worker(name).memory_bytes
        if needs > has:
            return (
                f"stage {plan.stage_of(rank)} needs {format_bytes(needs)} on worker '{name}' (has {format_bytes(has)});"
                " add a worker, raise num_stages, or lower microbatch_size"
            )
    return None
