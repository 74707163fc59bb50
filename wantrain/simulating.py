"""`wantrain simulate`: play a plan in virtual time, also on a network or on workers other than it was made for."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wantrain.errors import ConfigError, TopologyError, did_you_mean
from wantrain.fact import unwritable
from wantrain.hf_model import load_model
from wantrain.hf_profile import counted_profile
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.report.perfetto import save_trace
from wantrain.report.tables import deviation
from wantrain.resources import find_config, shipped
from wantrain.scheduler.cost_model import make_workload
from wantrain.scheduler.disturbance import Disturbance
from wantrain.scheduler.simulator import play_step
from wantrain.timeline import COMPUTE_KINDS, Event, Timeline
from wantrain.topology import Topology
from wantrain.units import (
    BANDWIDTH_UNITS,
    TIME_UNITS,
    format_bandwidth,
    format_bytes,
    format_time,
    parse_bytes_per_s,
    parse_quantity,
    parse_time_s,
)

_PICTURES = (".svg", ".png")
_PARTS = ("computing", "update", "waiting for tensors", "waiting for gradients")


class Link(NamedTuple):
    """The link that is busy longest in a step."""

    source: str
    target: str
    num_bytes: int
    bytes_per_s: float

    @property
    def busy_s(self) -> float:
        """Seconds that its bytes take."""
        return self.num_bytes / self.bytes_per_s


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain simulate`."""
    if args.picture is not None and Path(args.picture).suffix not in _PICTURES:
        raise ConfigError(f"a picture is a file that ends in .svg or .png (got '{args.picture}')")
    plan = Plan.load(args.plan)
    topology = _changed(
        Topology.load(find_config("topologies", args.topology or plan.topology, TopologyError)), args.set
    )
    workload = make_workload(plan, topology, _profile(plan, args))
    played = play_step(plan, topology, workload, _disturbance(args))
    timeline = played.timeline()
    if args.picture is not None:
        _draw(timeline, Path(args.picture))
    if args.trace is not None:
        save_trace(timeline, args.trace)
    shown = (plan, topology, timeline, played.step_s)
    print(json.dumps(_figures(*shown), indent=1) if args.json else _told(*shown))
    return 0


def _profile(plan: Plan, args: argparse.Namespace) -> ModelProfile:
    """Return what the plan's layers cost: a profile's figures, or those counted for a model."""
    if args.profile is not None:
        profile = ModelProfile.load(args.profile)
    elif args.model is None and plan.model not in shipped("models"):
        raise ConfigError(f"what the layers of '{plan.model}' cost is not known; give --model or --profile")
    else:
        profile = counted_profile(load_model(args.model or plan.model), plan.microbatch_size)
    for what, planned, known in (
        ("layers", plan.num_layers, profile.num_layers),
        ("samples a microbatch", plan.microbatch_size, profile.microbatch_size),
    ):
        if planned != known:
            raise ConfigError(
                f"the plan is for {planned} {what} (the profile has {known}); give the plan's own profile"
            )
    return profile


def _changed(topology: Topology, settings: Sequence[str]) -> Topology:
    """Return the topology with links set as asked: "a->b=300 Mbit/s", "a->b=20 ms"."""
    for setting in settings:
        ends, _, value = setting.partition("=")
        source, arrow, target = (part.strip() for part in ends.partition("->"))
        if not (source and arrow and target and value.strip()):
            raise ConfigError(f"can't set '{setting}' (expected text like 'oregon->tokyo=300 Mbit/s' or '…=90 ms')")
        names = {name for worker in topology.workers for name in (worker.name, worker.site)}
        for name in (source, target):
            if name not in names:
                hint = did_you_mean(name, names)
                raise ConfigError(f"can't set '{setting}': no worker or site is called '{name}'{hint}")
        topology = _with_link(topology, source, target, _figure(setting, value.strip()))
    return topology


def _figure(setting: str, value: str) -> dict[str, float]:
    """Return the field of a link that a rate or a latency sets."""
    try:
        parse_quantity(value, TIME_UNITS | BANDWIDTH_UNITS, "a link's rate or latency")
        if value.endswith("/s"):
            return {"bandwidth_bytes_per_s": parse_bytes_per_s(value)}
        return {"latency_s": parse_time_s(value)}
    except ValueError as caught:
        raise ConfigError(f"can't set '{setting}': {caught}") from None


def _with_link(topology: Topology, source: str, target: str, changes: dict[str, float]) -> Topology:
    """Set a link between two ends, and whatever the topology says of workers in them in particular."""
    inside = {
        end: {end} | {worker.name for worker in topology.workers if worker.site == end} for end in (source, target)
    }
    particular = [
        ends
        for rule in topology.rules
        for ends in rule.ends
        if ends[0] in inside[source] and ends[1] in inside[target] and ends != (source, target)
    ]
    for one, other in ((source, target), *dict.fromkeys(particular)):
        topology = topology.with_link(one, other, **changes)
    return topology


def _disturbance(args: argparse.Namespace) -> Disturbance:
    return Disturbance(
        slow=dict(_number(text, "--slow", "worker=2") for text in args.slow),
        jitter_seed=args.jitter,
        gone_at_s=dict(_number(text, "--gone", "worker=1.5") for text in args.gone),
        has_blocking_sends=args.blocking,
        overlaps_gradients=not args.blocking,
    )


def _number(text: str, option: str, example: str) -> tuple[str, float]:
    """Parse "worker=2"."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or math.isnan(value):
        raise ConfigError(f"{option} takes a worker and a number (got '{text}', expected text like '{example}')")
    return name.strip(), value


def _draw(timeline: Timeline, path: Path) -> None:
    from wantrain.report.style import house_style
    from wantrain.report.timelines import draw_timelines

    with house_style():
        figure = draw_timelines([timeline])
        try:
            figure.savefig(path, dpi=150)
        except OSError as caught:
            raise unwritable(path, caught) from None


def _parts(timeline: Timeline, step_s: float) -> tuple[int, dict[str, float]]:
    """Return the rank that computes longest, and what it spends the step on."""
    spent = [dict.fromkeys(_PARTS, 0.0) for _ in timeline.workers]
    for event in timeline.events:
        part = _part(event)
        if part is not None:
            spent[event.rank][part] += event.duration_s
    rank = max(range(len(spent)), key=lambda rank: spent[rank]["computing"])
    rest_s = step_s - sum(spent[rank].values())
    spent[rank]["update"] += min(0.0, rest_s)  # the word of the last ranks is on its way while the next step begins
    return rank, spent[rank] | {"done before the others": max(0.0, rest_s)}


def _part(event: Event) -> str | None:
    if event.kind == "wait":
        return "waiting for tensors" if event.microbatch >= 0 else "waiting for gradients"
    return "computing" if event.kind in COMPUTE_KINDS else {"step": "update"}.get(event.kind)


def _busiest(topology: Topology, timeline: Timeline) -> Link | None:
    links = [
        Link(*pair, num_bytes, topology.payload_bytes_per_s(*pair))
        for pair, num_bytes in timeline.bytes_by_link().items()
    ]
    return max(links, key=lambda link: link.busy_s, default=None)


def _figures(plan: Plan, topology: Topology, timeline: Timeline, step_s: float) -> dict[str, Any]:
    rank, spent = _parts(timeline, step_s)
    busiest = _busiest(topology, timeline)
    return {
        "step_s": step_s,
        "planned_step_s": plan.prediction.step_s if plan.prediction else None,
        "worker": timeline.workers[rank],
        "parts_s": spent,
        "busiest_link": busiest and busiest._asdict() | {"busy_s": busiest.busy_s},
    }


def _told(plan: Plan, topology: Topology, timeline: Timeline, step_s: float) -> str:
    """Say how long the step takes, what it is spent on, and what has changed."""
    rank, spent = _parts(timeline, step_s)
    lines = [f"step            {format_time(step_s)}{_against(plan, step_s)}"]
    parts = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in spent.items() if seconds > 0)
    lines.append(f"{timeline.workers[rank]} computes longest: {parts}")
    busiest = _busiest(topology, timeline)
    if busiest is not None:
        lines.append(
            f"busiest link    {busiest.source} → {busiest.target}: {format_bytes(busiest.num_bytes)} at"
            f" {format_bandwidth(busiest.bytes_per_s)}, {format_time(busiest.busy_s)} of the step"
        )
    return "\n".join(lines)


def _against(plan: Plan, step_s: float) -> str:
    if plan.prediction is None:
        return ""
    planned_s = plan.prediction.step_s
    return f" (the plan's own prediction: {format_time(planned_s)}, {deviation(step_s, planned_s)})"
