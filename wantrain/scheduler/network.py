"""A topology as flat sequences, for searches that look at millions of links.

A thousand workers in thirty sites have a million links but nine hundred kinds of them. Workers whose links cannot
differ share a *class*: those of one site that no rule of the file names, with equal lines of their own. Links are
looked up once for each ordered pair of classes.

Rates are kept as seconds per byte, what one sender alone takes; lines that several links share (a worker's, a site's)
stand beside them, with zero where there is no limit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wantrain.topology import PAYLOAD_SHARE, Topology, Worker

LineOf = Callable[[Worker], float | None]


class Network(NamedTuple):
    """Some workers of a topology: what each can do, by number, and their links, by pair of classes."""

    names: tuple[str, ...]
    speed: tuple[float, ...]
    memory: tuple[float, ...]
    site_of: tuple[int, ...]
    class_of: tuple[int, ...]
    kind_of: tuple[int, ...]
    """Workers of one kind are interchangeable: same class, speed, memory and price."""
    up_s_per_byte: tuple[float, ...]
    down_s_per_byte: tuple[float, ...]
    site_up_s_per_byte: tuple[float, ...]
    site_down_s_per_byte: tuple[float, ...]
    num_classes: int
    s_per_byte: tuple[float, ...]
    """Of the link from class a to class b, at a · num_classes + b."""
    latency_s: tuple[float, ...]
    sites: tuple[str, ...]

    @property
    def num_workers(self) -> int:
        return len(self.names)

    def link(self, source: int, target: int) -> int:
        """Return where the link between two workers stands in `s_per_byte` and `latency_s`."""
        return self.class_of[source] * self.num_classes + self.class_of[target]


def make_network(topology: Topology, names: Sequence[str]) -> Network:
    """Return the network of the named workers, in that order."""
    workers = [topology.worker(name) for name in names]
    named = {name for rule in topology.rules for pair in rule.ends for name in pair}
    class_of = _numbered([_class_key(worker, named) for worker in workers])
    sites = list(dict.fromkeys(worker.site for worker in workers))
    limits = {site.name: site for site in topology.sites}
    s_per_byte, latency_s = _links(topology, names, class_of)
    return Network(
        names=tuple(names),
        speed=tuple(worker.flops_per_s for worker in workers),
        memory=tuple(float(worker.memory_bytes) for worker in workers),
        site_of=tuple(sites.index(worker.site) for worker in workers),
        class_of=tuple(class_of),
        kind_of=tuple(_numbered([(c, *_own_key(w)) for c, w in zip(class_of, workers, strict=True)])),
        up_s_per_byte=tuple(_inverse(worker.uplink_bytes_per_s) for worker in workers),
        down_s_per_byte=tuple(_inverse(worker.downlink_bytes_per_s) for worker in workers),
        site_up_s_per_byte=tuple(_inverse(limits[s].uplink_bytes_per_s) if s in limits else 0.0 for s in sites),
        site_down_s_per_byte=tuple(_inverse(limits[s].downlink_bytes_per_s) if s in limits else 0.0 for s in sites),
        num_classes=max(class_of) + 1,
        s_per_byte=s_per_byte,
        latency_s=latency_s,
        sites=tuple(sites),
    )


def chained_sites(network: Network, num_bytes: float) -> list[list[int]]:
    """Return every order of the sites that always goes on to the nearest one, by the seconds of so many bytes."""
    first = {network.site_of[w]: w for w in reversed(range(network.num_workers))}

    @functools.cache
    def seconds(a: int, b: int) -> float:
        there, back = network.link(first[a], first[b]), network.link(first[b], first[a])
        latency_s = network.latency_s[there] + network.latency_s[back]
        return latency_s + num_bytes * (network.s_per_byte[there] + network.s_per_byte[back])

    chains = []
    for start in range(len(network.sites)):
        chain, left = [start], set(range(len(network.sites))) - {start}
        while left:
            chain.append(min(left, key=lambda site: (seconds(chain[-1], site), site)))
            left.remove(chain[-1])
        chains.append((sum(seconds(a, b) for a, b in itertools.pairwise(chain)), chain))
    return [chain for _, chain in sorted(chains)]


def _class_key(worker: Worker, named: set[str]) -> tuple[object, ...]:
    own_name = worker.name if worker.name in named else ""
    return (worker.site, worker.uplink_bytes_per_s, worker.downlink_bytes_per_s, own_name)


def _numbered(keys: Sequence[tuple[object, ...]]) -> list[int]:
    """Number equal keys alike, in the order of their first appearance."""
    numbers: dict[tuple[object, ...], int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _inverse(rate: float | None) -> float:
    return 0.0 if rate is None else 1.0 / (PAYLOAD_SHARE * rate)


def _links(
    topology: Topology, names: Sequence[str], class_of: Sequence[int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Look up one link for each ordered pair of classes; a class of one worker has none to itself."""
    members: dict[int, list[str]] = {}
    for name, number in zip(names, class_of, strict=True):
        members.setdefault(number, []).append(name)
    rates, latencies = [], []
    for a in range(len(members)):
        for b in range(len(members)):
            source, target = members[a][0], members[b][-1]
            if source == target:
                rates.append(0.0)
                latencies.append(0.0)
                continue
            rates.append(1.0 / topology.payload_bytes_per_s(source, target))
            latencies.append(topology.link(source, target).latency_s)
    return tuple(rates), tuple(latencies)


def _own_key(worker: Worker) -> tuple[object, ...]:
    return (worker.flops_per_s, worker.memory_bytes, worker.price_per_hour)
