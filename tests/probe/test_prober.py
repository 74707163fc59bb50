"""The prober on known networks, in virtual time: what it asks of the workers, and what comes out."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from networks import fair_rates, topology_of, two_sites

from wantrain.errors import TopologyError
from wantrain.probe import prober
from wantrain.probe.control import Message, Workers
from wantrain.probe.measurement import Measurement, Pair, Participant
from wantrain.probe.prober import Prober
from wantrain.probe.topology_text import topology_text
from wantrain.topology import Topology

Noise = Callable[[float, set[Pair]], float]


class VirtualWorkers(Workers):
    """Workers of a known network whose lines are shared evenly; their clock runs when the prober sleeps."""

    def __init__(self, topology: Topology, noise: Noise = lambda now_s, busy: 1.0) -> None:
        super().__init__([], [worker.name for worker in topology.workers], 1.0)
        self.topology, self.noise, self.now_s = topology, noise, 0.0
        self.busy: set[Pair] = set()
        self.received: dict[Pair, float] = {}
        self.rounds: list[set[Pair]] = []

    def sleep(self, seconds: float) -> None:
        rates = fair_rates(self.topology, sorted(self.busy))
        for pair, rate in rates.items():
            self.received[pair] = self.received.get(pair, 0.0) + rate * seconds * self.noise(self.now_s, self.busy)
        self.now_s += seconds

    def ask(self, commands: Mapping[int, Message], timeout_s: float | None = None) -> dict[int, Message]:
        replies = {rank: getattr(self, f"_{command['do']}")(rank, command) for rank, command in commands.items()}
        if self.busy and next(iter(commands.values()))["do"] == "send":
            self.rounds.append(set(self.busy))
        return replies

    def _ping(self, rank: int, command: Message) -> Message:
        own = self.names[rank]
        rtt_s = [2 * self.topology.link(own, self.names[other]).latency_s for other in command["ranks"]]
        return {"round_trips_s": [[1.0, 1.0] + [one] * (command["count"] - 2) for one in rtt_s]}

    def _send(self, rank: int, command: Message) -> Message:
        flows = {(self.names[rank], self.names[target]) for target, _ in command["to"]}
        self.busy |= flows
        self.received |= dict.fromkeys(flows, 0.0)
        return {}

    def _count(self, rank: int, command: Message) -> Message:
        own = self.names[rank]
        counts = [[self.names.index(a), round(count)] for (a, b), count in self.received.items() if b == own]
        return {"now_s": self.now_s, "received": counts}

    def _stop(self, rank: int, command: Message) -> Message:
        self.busy = {pair for pair in self.busy if pair[0] != self.names[rank]}
        return {}


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Measurement, VirtualWorkers, list[str]]]:
    """Return a function that measures a known network; its workers can know their sites."""

    def run(
        data: dict[str, Any], knows_sites: bool = False, **given: Any
    ) -> tuple[Measurement, VirtualWorkers, list[str]]:
        topology = topology_of(data)
        workers = VirtualWorkers(topology, **given)
        clock = SimpleNamespace(sleep=workers.sleep, monotonic=lambda: workers.now_s)
        monkeypatch.setattr(prober, "time", clock)
        participants = [
            Participant(one.name, one.site if knows_sites else "", memory_bytes=10**9) for one in topology.workers
        ]
        said: list[str] = []
        return Prober(workers, participants, said.append).run(), workers, said

    return run


Probe = Callable[..., tuple[Measurement, VirtualWorkers, list[str]]]


def written(made: Measurement) -> Topology:
    return Topology.parse(tomllib.loads(topology_text(made, "t", "a test")), TopologyError, "t")


@pytest.mark.parametrize("site", [{}, {"uplink": "70 Mbit/s"}])
def test_a_known_network_is_found_sites_links_and_lines(probe: Probe, site: dict[str, str]) -> None:
    made, workers, _ = probe(two_sites(**site))
    found = written(made)
    assert [worker.site for worker in found.workers] == ["site-0", "site-0", "site-1", "site-1"]
    for a, b, link in workers.topology.pairs():
        own = found.link(a.name, b.name)
        assert own.bandwidth_bytes_per_s == pytest.approx(link.bandwidth_bytes_per_s, rel=1e-3)
        assert own.latency_s == pytest.approx(link.latency_s, rel=1e-3)
    assert [one.uplink_bytes_per_s for one in found.sites] == ([pytest.approx(70e6 / 8, rel=1e-3)] if site else [])


def test_sites_that_are_given_are_kept(probe: Probe) -> None:
    made, _, _ = probe(two_sites(), knows_sites=True)
    assert list(made.sites) == ["east", "west"]


def test_pairs_of_a_round_are_disjoint_and_rounds_are_few(probe: Probe) -> None:
    _, workers, _ = probe(two_sites())
    one_way = [pairs for pairs in workers.rounds if len({source for source, _ in pairs}) == len(pairs) == 2]
    assert all(len({target for _, target in pairs}) == 2 for pairs in one_way)
    assert len(workers.rounds) <= 3 + 6 + 2 + 8 + 4


def test_every_phase_is_shown(probe: Probe) -> None:
    _, _, said = probe(two_sites())
    phases = list(dict.fromkeys(text.partition(",")[0] for text in said))
    assert phases == [
        "round trips", "rates over one connection", "rates over 8 connections", "rates over a line alone", "in all"
    ]  # fmt: skip


def test_a_machine_that_is_busy_for_a_while_passes_for_no_shared_line(probe: Probe) -> None:
    began: list[float] = []

    def stutter(now_s: float, busy: set[Pair]) -> float:
        if len(busy) == 3:
            began.append(now_s)
        return 0.5 if began and now_s < began[0] + 2.0 else 1.0

    made, _, _ = probe(two_sites(), noise=stutter)
    assert written(made).workers[0].uplink_bytes_per_s is None


def test_rates_that_never_settle_are_given_up_in_time(probe: Probe) -> None:
    made, workers, _ = probe(two_sites(), noise=lambda now_s, busy: 1.0 + 0.5 * (round(now_s * 100) % 7) / 7)
    assert len(made.several_bytes_per_s) == 12
    assert workers.now_s < 120
