"""Who sends to whom in a step, and over which lines: a plan's lanes on a topology, as arrays.

For replicas × stages ranks there are two pipeline lanes for each boundary and replica, and a gradient lane for each
ordered pair of a data group. A topology is slow to ask pair by pair, so it is turned into arrays once, and kept for the
next plan on it: a search plays thousands.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wantrain.plan import Plan
from wantrain.scheduler.disturbance import Disturbance
from wantrain.scheduler.network import make_network
from wantrain.scheduler.script import (
    FIRST_SENDING,
    JITTER_S,
    LANES,
    LATENCY_S,
    LINE_OF,
    PACE,
    PRIORITY,
    S_PER_BYTE,
    SOURCE,
    TARGET,
    WAYS,
)
from wantrain.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Columns = dict[tuple[int, int], Any]
"""Of the script's tables, by table and number."""


class Ground(NamedTuple):
    """A topology's workers by number; seconds per byte are zero where nothing limits."""

    number_of: dict[str, int]
    class_of: Ints
    site_of: Ints
    up: Floats
    down: Floats
    site_up: Floats
    site_down: Floats
    s_per_byte: Floats
    latency_s: Floats


class _Same:
    """A topology as the key of a cache: the same if its parts are the very same objects."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._parts = (topology.workers, topology.sites, topology.rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(a is b for a, b in zip(self._parts, other._parts, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self._parts)))


@functools.lru_cache(maxsize=8)
def _ground(key: _Same) -> Ground:
    network = make_network(key.topology, [worker.name for worker in key.topology.workers])
    shape = (network.num_classes, network.num_classes)
    return Ground(
        number_of={name: number for number, name in enumerate(network.names)},
        class_of=np.array(network.class_of),
        site_of=np.array(network.site_of),
        up=np.array(network.up_s_per_byte),
        down=np.array(network.down_s_per_byte),
        site_up=np.array(network.site_up_s_per_byte),
        site_down=np.array(network.site_down_s_per_byte),
        s_per_byte=np.array(network.s_per_byte).reshape(shape),
        latency_s=np.array(network.latency_s).reshape(shape),
    )


def ground(topology: Topology) -> Ground:
    """Return a topology as arrays."""
    return _ground(_Same(topology))


def busy_s(topology: Topology, sent: Mapping[tuple[str, str], int]) -> list[float]:
    """Return how long each link takes for the bytes that it carries, alone on all the lines on its way."""
    known = ground(topology)
    a, b = (np.array([known.number_of[pair[end]] for pair in sent], dtype=np.int64) for end in (0, 1))
    is_far = known.site_of[a] != known.site_of[b]
    ways = [known.s_per_byte[known.class_of[a], known.class_of[b]], known.up[a], known.down[b]]
    ways += [is_far * known.site_up[known.site_of[a]], is_far * known.site_down[known.site_of[b]]]
    seconds: list[float] = (np.array(list(sent.values())) * np.max(ways, axis=0)).tolist()
    return seconds


class Lanes(NamedTuple):
    """Who sends to whom: forwards, backwards, then gradients."""

    source: Ints
    target: Ints
    num_pipeline: int
    next_lane: Ints
    """Of each rank, towards the next stage; -1: none."""
    previous_lane: Ints
    gradient_lane: Ints


def number_lanes(plan: Plan, has_gradients: bool) -> Lanes:
    ranks = np.arange(plan.world_size)
    senders = ranks[ranks % plan.num_stages < plan.num_stages - 1]
    next_lane, previous_lane = np.full(plan.world_size, -1), np.full(plan.world_size, -1)
    next_lane[senders] = np.arange(len(senders))
    previous_lane[senders + 1] = len(senders) + np.arange(len(senders))
    members = len(plan.replicas) if has_gradients else 0
    sources = ranks.repeat(members)
    targets = (np.arange(members) * plan.num_stages + (ranks % plan.num_stages)[:, None]).ravel()
    is_lane = sources != targets
    return Lanes(
        source=np.concatenate([senders, senders + 1, sources[is_lane]]),
        target=np.concatenate([senders + 1, senders, targets[is_lane]]),
        num_pipeline=2 * len(senders),
        next_lane=next_lane,
        previous_lane=previous_lane,
        gradient_lane=np.where(is_lane, 2 * len(senders) + np.cumsum(is_lane) - 1, -1),
    )


def lane_columns(plan: Plan, topology: Topology, lanes: Lanes, disturbance: Disturbance) -> Columns:
    names, jitter_s = plan.workers, np.zeros(len(lanes.source))
    if disturbance.jitter_seed is not None:
        pairs = zip(lanes.source.tolist(), lanes.target.tolist(), strict=True)
        jitter_s = np.array([topology.link(names[a], names[b]).jitter_s for a, b in pairs])
    return {
        (LANES, SOURCE): lanes.source,
        (LANES, TARGET): lanes.target,
        (LANES, PRIORITY): np.arange(len(lanes.source)) >= lanes.num_pipeline,
        (LANES, FIRST_SENDING): -1,
        (LANES, JITTER_S): jitter_s,
    }


def way_columns(plan: Plan, topology: Topology, lanes: Lanes) -> tuple[int, Columns]:
    """Return how many lines there are, those on every lane's way, what a byte takes on it and its latency.

    Lines are numbered: uplinks and downlinks of workers, those of sites, then one for each link.
    """
    known = ground(topology)
    for name in plan.workers:
        topology.worker(name)
    workers = np.array([known.number_of[name] for name in plan.workers])
    a, b = workers[lanes.source], workers[lanes.target]
    sites = known.site_of[a], known.site_of[b]
    num_workers, num_sites = len(known.up), len(known.site_up)
    leaves = sites[0] != sites[1]
    link_s = known.s_per_byte[known.class_of[a], known.class_of[b]]
    lines = [
        (2 * num_workers + 2 * num_sites + np.arange(len(a)), link_s),
        (a, known.up[a]),
        (num_workers + b, known.down[b]),
        (2 * num_workers + sites[0], np.where(leaves, known.site_up[sites[0]], 0.0)),
        (2 * num_workers + num_sites + sites[1], np.where(leaves, known.site_down[sites[1]], 0.0)),
    ]
    return 2 * num_workers + 2 * num_sites + len(a), {
        (WAYS, LINE_OF): np.array([np.where(pace > 0, line, -1) for line, pace in lines], dtype=np.int64).T.ravel(),
        (WAYS, PACE): np.array([pace for _, pace in lines], dtype=float).T.ravel(),
        (LANES, S_PER_BYTE): link_s,
        (LANES, LATENCY_S): known.latency_s[known.class_of[a], known.class_of[b]],
    }
