"""What was measured between workers: plain figures, by name. Rates are TCP payload, latencies one way.

Clocks of two machines are not one clock, so the one-way latency is half of the round trip: on a path whose two ways
differ it is wrong by half of the difference, which no plan notices, since what waits is always a round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Pair = tuple[str, str]

NEAR_S = 3e-3
"""Chosen: workers further apart than this, one way, are not one site: 600 km of fibre."""

_NOISE_S = 0.3e-3
"""Chosen: below this, latencies are the operating systems' more than the network's."""

_STEP = 3.0
"""Chosen: where the next nearest is three times as far as the farthest so far, a site ends."""


@dataclass(frozen=True)
class Participant:
    """A worker that was measured, and what it says of itself."""

    name: str
    site: str = ""
    address: str = ""
    host: str = ""
    """Identifies the machine: several workers can run on one."""
    device: str = "cpu"
    memory_bytes: int = 0
    flops_per_s: float | None = None
    codec_values_per_s: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured; payload bytes per second over one connection, and over several."""

    workers: tuple[Participant, ...]
    latency_s: dict[Pair, float]
    single_bytes_per_s: dict[Pair, float]
    several_bytes_per_s: dict[Pair, float]
    num_connections: int
    alone_bytes_per_s: dict[Pair, float] = field(default_factory=dict)
    """The rate of some pairs while no other pair crosses their two sites."""
    sent_bytes_per_s: dict[str, float] = field(default_factory=dict)
    """What a worker sends while all others are its destinations; the next ones likewise."""
    received_bytes_per_s: dict[str, float] = field(default_factory=dict)
    site_sent_bytes_per_s: dict[str, float] = field(default_factory=dict)
    site_received_bytes_per_s: dict[str, float] = field(default_factory=dict)
    site_flows: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    """The pairs that were busy when a site's sending was measured; turned around, when its receiving was."""

    @property
    def sites(self) -> dict[str, list[str]]:
        """The workers of each site, in order."""
        found: dict[str, list[str]] = {}
        for worker in self.workers:
            found.setdefault(worker.site, []).append(worker.name)
        return found

    def best_bytes_per_s(self, pair: Pair) -> float:
        """Return what a pair reached, over however many connections."""
        return max(self.single_bytes_per_s[pair], self.several_bytes_per_s[pair])


def turned(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Return the pairs of the other way."""
    return tuple((target, source) for source, target in pairs)


def find_sites(names: Sequence[str], latency_s: dict[Pair, float]) -> dict[str, str]:
    """Return the site of each worker, found by who is near whom.

    Workers are joined nearest first (single linkage). Joining ends before the greatest jump in distance, by a factor of
    three at least, and at 3 ms in any case.
    """
    joins = _spanning_tree(names, latency_s)
    apart = [max(distance, _NOISE_S) for distance, *_ in joins]
    jumps = [(after / before, i) for i, (before, after) in enumerate(itertools.pairwise(apart), start=1)]
    factor, cut = max(jumps, default=(0.0, 0))
    if factor < _STEP:
        cut = len(joins)
    home = {name: name for name in names}
    for distance, a, b in joins[:cut]:
        if distance <= NEAR_S:
            kept, gone = sorted((home[a], home[b]), key=list(names).index)
            home = {name: kept if place == gone else place for name, place in home.items()}
    numbers = {place: f"site-{i}" for i, place in enumerate(dict.fromkeys(home.values()))}
    return {name: numbers[place] for name, place in home.items()}


def _spanning_tree(names: Sequence[str], latency_s: dict[Pair, float]) -> list[tuple[float, str, str]]:
    """Return the joins of single linkage, nearest first: the edges of the minimum spanning tree (Prim)."""
    joins = []
    nearest = {name: (latency_s[names[0], name], names[0]) for name in names[1:]}
    while nearest:
        name = min(nearest, key=lambda one: nearest[one][0])
        distance, neighbour = nearest.pop(name)
        joins.append((distance, neighbour, name))
        for other in nearest:
            nearest[other] = min(nearest[other], (latency_s[name, other], name))
    return sorted(joins)
