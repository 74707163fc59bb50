"""Write a placement down as a Plan: stages, replicas with their lanes, and a transport that fills each link."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wantrain.errors import PlanError
from wantrain.plan import BoundaryPlan, Plan, ReplicaPlan, StagePlan
from wantrain.schedule import WITH_DEPTH, default_in_flight, default_postponed, is_own
from wantrain.scheduler.lanes import Deck
from wantrain.scheduler.network import Network
from wantrain.scheduler.problem import Request, bucket_bytes_for
from wantrain.topology import Topology
from wantrain.wire import Transport, transport_for

_FACTORS = (1, 2, 3, 4, 8)
"""Chosen: how many times 1F1B's own depth is tried; a long link takes a multiple, and 8 is more than any table asks."""

_SPLIT_FACTORS = (1, 2, 3, 4, 6, 8)
"""Chosen: gradients of weights hide more of a long link, and what is best lies between. How far stages are apart is
multiplied then, not the depth of the last one: that would hold up its first gradient (seen: 3 % of a step at 500 Mbit/s
and 4 % at 100 ms, 8 stages × 32)."""


def split_depths(num_stages: int, most: int) -> list[tuple[int, ...]]:
    """Return the depths that are worth trying where the backward is split, of at most so many microbatches."""
    behind = range(num_stages - 1, -1, -1)
    return [tuple(min(most, 1 + factor * stages) for stages in behind) for factor in _SPLIT_FACTORS]


def split_choices(depths: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Return how much may wait at these depths: all, as much as the first stage holds, or nothing."""
    some = default_postponed("zero_bubble", most, depths)
    return list(dict.fromkeys(((most,) * len(depths), some, (0,) * len(depths))))


class Placement(NamedTuple):
    """Who holds what: workers by number, a row per replica; the stages' cuts; the units of lanes of each replica."""

    rows: tuple[tuple[int, ...], ...]
    cuts: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.cuts) - 1

    @property
    def workers(self) -> list[int]:
        return [w for row in self.rows for w in row]


class Drafter:
    """Writes plans for one request; remembers the transports of links it has seen."""

    def __init__(self, request: Request, topology: Topology, network: Network, deck: Deck) -> None:
        self._request, self._topology, self._network, self._deck = request, topology, network, deck
        self._transports: dict[tuple[int, int], Transport] = {}

    def counts(self, units: Sequence[int]) -> list[int]:
        """Return the microbatches of each replica."""
        return [count * self._deck.microbatches_per_unit for count in units]

    def depths(self, placement: Placement, limit: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield depths to try: what was asked, or multiples of 1F1B's own, at most what memory is thought to allow."""
        request, num_stages = self._request, placement.num_stages
        most = max(self.counts(placement.units))
        if request.max_in_flight is not None:
            yield request.max_in_flight
            return
        base = default_in_flight(request.schedule, num_stages, most)
        if is_own(request.schedule):
            yield base
            return
        if request.schedule == "zero_bubble":
            wanted = split_depths(num_stages, most)
        else:
            wanted = [tuple(min(most, factor * depth) for depth in base) for factor in _FACTORS]
        if request.schedule in WITH_DEPTH:
            held = [tuple(map(min, depths, limit)) for depths in wanted]
            wanted = [depths for pair in zip(wanted, held, strict=True) for depths in pair]
        yield from dict.fromkeys(tuple(max(depth, 1) for depth in depths) for depths in wanted)

    def plans(self, placement: Placement, depths: tuple[int, ...]) -> Iterator[Plan]:
        """Yield the plans of a depth: one, or where the backward is split one for each choice of what may wait."""
        if self._request.schedule != "zero_bubble":
            yield self.plan(placement, depths)
            return
        for postponed in split_choices(depths, max(self.counts(placement.units))):
            yield self.plan(placement, depths, postponed)

    def plan(self, placement: Placement, depths: Sequence[int], postponed: Sequence[int] | None = None) -> Plan:
        """Return the plan, checked, without a prediction; how much is left for later follows from the depths."""
        request, names = self._request, self._network.names
        if postponed is None:
            postponed = default_postponed(request.schedule, max(self.counts(placement.units)), depths)
        rows, lanes = placement.rows, self._deck.lanes_of(placement.units)
        return Plan.parse(
            {
                "topology": self._topology.name,
                "model": request.model,
                "num_layers": len(request.profile.layers),
                "batch_size": request.batch_size,
                "microbatch_size": request.profile.microbatch_size,
                "num_lanes": self._deck.num_lanes,
                "schedule": request.schedule,
                "stages": tuple(
                    StagePlan(first_layer=first, end_layer=end, max_in_flight=depth, max_postponed=later)
                    for (first, end), depth, later in zip(
                        itertools.pairwise(placement.cuts), depths, postponed, strict=True
                    )
                ),
                "replicas": tuple(
                    ReplicaPlan(workers=tuple(names[w] for w in row), num_microbatches=count, lanes=own)
                    for row, count, own in zip(rows, self.counts(placement.units), lanes, strict=True)
                ),
                "boundaries": tuple(self._boundary(rows, s) for s in range(placement.num_stages - 1)),
                "gradient_codec": request.gradient_codec,
                "gradient_transport": self._gradient_transport(rows),
                "bucket_bytes": bucket_bytes_for(request, placement.num_stages, len(rows)),
                "max_codec_error": request.max_codec_error,
                "buffer_bytes": request.buffer_bytes,
                "under_way_bytes": self._under_way_bytes(rows),
            },
            PlanError,
            "plan",
        )

    def _boundary(self, rows: Sequence[Sequence[int]], s: int) -> BoundaryPlan:
        return BoundaryPlan(
            forward_codec=self._request.forward_codec,
            backward_codec=self._request.backward_codec,
            transports=tuple(self._transport(row[s], row[s + 1]) for row in rows),
        )

    def _transport(self, source: int, target: int) -> Transport:
        """Return a transport that fills the link in both directions."""
        network = self._network
        ways = (network.link(source, target), network.link(target, source))
        if ways not in self._transports:
            rate = max(1 / network.s_per_byte[way] for way in ways)
            self._transports[ways] = transport_for(rate, max(network.latency_s[way] for way in ways))
        return self._transports[ways]

    def _gradient_transport(self, rows: Sequence[Sequence[int]]) -> Transport:
        """Return the transport of the data groups: the one that the longest, fastest pair among them needs."""
        found = [Transport()] if len(rows) == 1 else []
        for column in zip(*rows, strict=True):
            of_class: dict[int, list[int]] = {}
            for w in column:
                of_class.setdefault(self._network.class_of[w], []).append(w)
            few = [w for own in of_class.values() for w in own[:2]]
            found += [self._transport(a, b) for a in few for b in few if a != b]
        return max(found, key=lambda transport: transport.window_bytes)

    def _under_way_bytes(self, rows: Sequence[Sequence[int]]) -> dict[str, int]:
        """Bound what each worker has under way where one line carries all its links: the window that fills the line."""
        network = self._network
        columns = list(zip(*rows, strict=True))
        bounds = {}
        for row in rows:
            for s, w in enumerate(row):
                others = ({*row[max(0, s - 1) : s + 2], *columns[s]}) - {w}
                if len(others) < 2 or not network.up_s_per_byte[w]:
                    continue
                uplink = 1 / network.up_s_per_byte[w]
                links = [self._topology.link(network.names[w], network.names[other]) for other in others]
                if uplink < sum(link.bandwidth_bytes_per_s for link in links):
                    window = transport_for(uplink, max(link.latency_s for link in links)).window_bytes
                    bounds[network.names[w]] = window
        return bounds
