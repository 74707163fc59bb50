"""Networks that are known, measured as a perfect prober would: every line shared evenly by the pairs that are busy."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from typing import Any

from wantrain.errors import TopologyError
from wantrain.probe.measurement import Measurement, Pair, Participant
from wantrain.probe.prober import busy_groups, each_way, site_flows
from wantrain.probe.rounds import tournament
from wantrain.probe.shared_lines import unlike_pairs
from wantrain.topology import PAYLOAD_SHARE, Topology


def two_sites(**site: str) -> dict[str, Any]:
    """Return a topology's data: a-0, a-1 in east, b-0, b-1 in west, 100 Mbit/s inside, 50 between; limits for east."""
    data: dict[str, Any] = {
        "name": "t",
        "worker": [{"name": "a", "count": 2, "site": "east"}, {"name": "b", "count": 2, "site": "west"}],
        "link": [
            {"within": "east", "bandwidth": "100 Mbit/s", "latency": "1 ms"},
            {"within": "west", "bandwidth": "100 Mbit/s", "latency": "1 ms"},
            {"between": ["east", "west"], "bandwidth": "50 Mbit/s", "latency": "20 ms"},
        ],
    }
    return data | ({"site": [{"name": "east"} | site]} if site else {})


def topology_of(data: dict[str, Any]) -> Topology:
    return Topology.parse(data, TopologyError, "t")


def fair_rates(topology: Topology, pairs: Sequence[Pair]) -> dict[Pair, float]:
    """Return the payload rates of busy pairs: all grow together, and each stops at the first full line on its way."""
    lines = {pair: [((*pair, "link"), topology.link(*pair).bandwidth_bytes_per_s)] for pair in pairs}
    for pair in pairs:
        lines[pair] += topology.shared_limits(*pair)  # type: ignore[arg-type]
    capacity = {name: rate * PAYLOAD_SHARE for own in lines.values() for name, rate in own}
    growing, rates = set(pairs), dict.fromkeys(pairs, 0.0)
    while growing:
        users = {name: sum(name in dict(lines[pair]) for pair in growing) for name in capacity}
        step = min(left / users[name] for name, left in capacity.items() if users[name])
        for pair in growing:
            rates[pair] += step
        capacity = {name: left - step * users[name] for name, left in capacity.items()}
        full = {name for name, left in capacity.items() if left < 1e-6 * PAYLOAD_SHARE}
        growing = {pair for pair in growing if not full & set(dict(lines[pair]))}
    return rates


def measure(topology: Topology) -> Measurement:
    """Return what the prober would find on a quiet network."""
    workers = tuple(Participant(one.name, one.site, memory_bytes=10**9) for one in topology.workers)
    names = [one.name for one in workers]
    latency_s = {(a.name, b.name): link.latency_s for a, b, link in topology.pairs()}
    rates = {pair: rate for pairs in each_way(tournament(names)) for pair, rate in fair_rates(topology, pairs).items()}
    made = Measurement(workers, latency_s, rates, rates, 8)
    firsts = [own[0] for own in made.sites.values()]
    alone = {pair: rate for pairs in each_way(tournament(firsts)) for pair, rate in fair_rates(topology, pairs).items()}
    made = dataclasses.replace(made, alone_bytes_per_s=alone)
    again = {pair: fair_rates(topology, [pair])[pair] for pair in unlike_pairs(made)}
    sums: dict[str, Any] = {
        what: {name: sum(fair_rates(topology, pairs).values()) for name, pairs in groups.items()}
        for what, groups in busy_groups(made).items()
    }
    return dataclasses.replace(made, alone_bytes_per_s=alone | again, site_flows=site_flows(made), **sums)


def free_port() -> int:
    """Return a port of this host that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
