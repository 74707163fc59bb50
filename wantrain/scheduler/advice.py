"""What would help most: every link, line and worker that a plan uses, made twice as good, and played again; and what
costs nothing but memory, a backward in two parts.

A link between two sites is changed for all pairs of workers that cross it, for that is what one can buy. Workers are
changed one by one, stage by stage and all at once: where several are equally slow, one faster alone is no help.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import memory_bytes, predict
from wantrain.scheduler.draft import split_choices, split_depths
from wantrain.topology import Site, Topology, Worker
from wantrain.units import format_bandwidth

FACTOR = 2.0
"""Chosen: about the next better line that is sold."""

_LEAST_GAIN = 0.005
"""Chosen: below half a percent nothing is worth doing."""


@dataclass(frozen=True)
class Advice:
    """One change, and the step that it would lead to."""

    what: str
    change: str
    step_s: float
    gain: float
    """Share of the step that is saved."""

    def __str__(self) -> str:
        return f"{self.what} {self.change}: −{100 * self.gain:.0f} %"


def what_would_help(plan: Plan, topology: Topology, profile: ModelProfile) -> list[Advice]:
    """Return what would make the plan's step shorter, the best first."""
    now_s = predict(plan, topology, profile).step_s
    advice = []
    for what, change, changed in _changes(plan, topology):
        step_s = predict(plan, changed, profile).step_s
        if step_s < now_s * (1 - _LEAST_GAIN):
            advice.append(Advice(what, change, step_s, 1 - step_s / now_s))
    split = [(predict(one, topology, profile).step_s, one) for one in _split(plan, topology, profile)]
    if split:
        step_s, best = min(split, key=lambda one: one[0])
        whole = _changed_stages(plan, [stage.max_in_flight for stage in best.stages], [0] * plan.num_stages, "1f1b")
        if step_s < min(now_s, predict(whole, topology, profile).step_s) * (1 - _LEAST_GAIN):  # not depth's gain alone
            advice.append(Advice("schedule", f"zero_bubble in place of {plan.schedule}", step_s, 1 - step_s / now_s))
    return sorted(advice, key=lambda one: one.step_s)


def _split(plan: Plan, topology: Topology, profile: ModelProfile) -> Iterator[Plan]:
    """Yield the plan with the backward split, in every way that its workers have the memory for."""
    most = max(replica.num_microbatches for replica in plan.replicas)
    if plan.schedule not in ("1f1b", "gpipe") or not any(layer.weight_flops for layer in profile.layers):
        return
    for depths in split_depths(plan.num_stages, most):
        for postponed in split_choices(depths, most):
            split = _changed_stages(plan, depths, postponed, "zero_bubble")
            needs = (memory_bytes(split, profile, rank) for rank in range(plan.world_size))
            if all(need <= topology.worker(name).memory_bytes for need, name in zip(needs, plan.workers, strict=True)):
                yield split


def _changed_stages(plan: Plan, depths: Sequence[int], postponed: Sequence[int], schedule: str) -> Plan:
    stages = tuple(
        stage.model_copy(update={"max_in_flight": depth, "max_postponed": later})
        for stage, depth, later in zip(plan.stages, depths, postponed, strict=True)
    )
    return plan.model_copy(update={"schedule": schedule, "stages": stages, "prediction": None})


def _changes(plan: Plan, topology: Topology) -> Iterator[tuple[str, str, Topology]]:
    """Yield each change with the topology that it makes. What is equally busy counts only together."""
    for ends in _used_links(plan, topology):
        rate = topology.with_link(*ends).rules[-1].bandwidth_bytes_per_s
        changed = topology.with_link(*ends, bandwidth_bytes_per_s=FACTOR * rate)
        yield f"link {ends[0]} → {ends[1]}", _from_to(rate), changed
    groups = _groups(plan)
    for line in ("uplink", "downlink"):
        for who, names in groups.items():
            yield from _wider(topology, topology.workers, names, line, who)
        for site in topology.sites:
            yield from _wider(topology, topology.sites, [site.name], line, site.name)
    for who, names in groups.items():
        yield who, f"{FACTOR:g} times as fast", _changed(topology, topology.workers, names, "flops_per_s")


def _groups(plan: Plan) -> dict[str, Sequence[str]]:
    """Return workers to change together: each by itself, those of a stage, all."""
    groups: dict[str, Sequence[str]] = {f"worker {name}": [name] for name in plan.workers}
    for stage in range(plan.num_stages):
        if len(plan.replicas) > 1:
            groups[f"all workers of stage {stage}"] = [plan.workers[rank] for rank in plan.data_group(stage)]
    return groups | {"all workers": plan.workers}


def _wider(
    topology: Topology, places: Sequence[Worker | Site], names: Sequence[str], line: str, who: str
) -> Iterator[tuple[str, str, Topology]]:
    """Yield the change of a shared line, if these places have one."""
    attribute = f"{line}_bytes_per_s"
    rates = [rate for place in places if place.name in names and (rate := getattr(place, attribute)) is not None]
    if rates:
        yield f"{line} of {who}", _from_to(min(rates)), _changed(topology, places, names, attribute)


def _changed(topology: Topology, places: Sequence[Worker | Site], names: Sequence[str], attribute: str) -> Topology:
    """Return the topology with a figure of some workers or sites made better, where they have one."""

    def better(place: Worker | Site) -> Worker | Site:
        now = getattr(place, attribute)
        chosen = place.name in names and now is not None
        return place.model_copy(update={attribute: FACTOR * now}) if chosen else place

    kind = "workers" if places is topology.workers else "sites"
    return topology.model_copy(update={kind: tuple(better(place) for place in places)})


def _from_to(rate: float) -> str:
    return f"from {format_bandwidth(rate)} to {format_bandwidth(FACTOR * rate)}"


def _used_links(plan: Plan, topology: Topology) -> list[tuple[str, str]]:
    """Return the ends of all links that carry something, each once, in the plan's order."""
    pairs = [pair for replica in plan.replicas for pair in itertools.pairwise(replica.workers)]
    pairs += [pair[::-1] for pair in pairs]
    for stage in range(plan.num_stages):
        pairs += itertools.permutations([plan.workers[rank] for rank in plan.data_group(stage)], 2)
    return list(dict.fromkeys(topology.link_ends(*pair) for pair in pairs))
