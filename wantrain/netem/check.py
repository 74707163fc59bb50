"""Measure an emulated network, asked beside measured; what this machine can't carry is an error, never a silent cap.

Rates are TCP payload, hence `PAYLOAD_SHARE` of the link's own. Pairs are measured in rounds in which no two share a
worker or a site's limit, so that each gets what its link alone gives; a pair that falls short in company is measured
again by itself, up to three times, before it is called short. Then every worker with an uplink limit sends to all
others at once. Figures are undilated: what the network stands for, not what the machine carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from wantrain.errors import EmulationError
from wantrain.netem.emulate import EmulatedNetwork
from wantrain.netem.traffic import Delays, Pair, one_way_delays, payload_rates
from wantrain.topology import PAYLOAD_SHARE, Topology
from wantrain.units import format_bandwidth, format_time

RATE_TOLERANCE = 0.05
LATENCY_TOLERANCE = 0.05
LATENCY_TOLERANCE_S = 1e-3
"""A latency is right within 1 ms or 5 %, a rate within 5 % unless the user accepts less."""

_LEAST_WARM_UP_S, _WARM_UP_RTTS = 1.0, 20
"""Chosen: slow start takes log2 of the window round trips (10 for 1 Gbit/s at 20 ms), and BBR ten more to settle."""

_LEAST_TIMED_S, _TIMED_RTTS = 0.5, 4

_PATIENCE = 4
"""Chosen: how much longer a second look takes: TCP's ups and downs even out, a missing rate stays missing."""

_MOST_REPEATS = 3
"""Chosen: what else the machine does for a moment must not fail a network that is right the next."""

_NUM_PROBES, _NUM_LOSS_PROBES = 25, 2000

_UNTIMED = Delays(1, ())


@dataclass(frozen=True)
class LinkCheck:
    """One ordered pair, asked and measured; rates are payload, latency is one way."""

    source: str
    target: str
    asked_bytes_per_s: float
    measured_bytes_per_s: float
    asked_latency_s: float
    measured_latency_s: float
    asked_jitter_s: float = 0.0
    measured_jitter_s: float = 0.0
    asked_loss: float = 0.0
    measured_loss: float = 0.0
    was_shared: bool = False
    rate_tolerance: float = RATE_TOLERANCE

    @property
    def rate_is_right(self) -> bool:
        """Whether the rate is within the tolerance; only shown, not judged, where TCP decides it.

        That is on links that lose or reorder, and where other busy pairs shared a limit on the way.
        """
        if self.was_shared or self.asked_loss or self.asked_jitter_s:
            return True
        return _near(self.measured_bytes_per_s, self.asked_bytes_per_s, self.rate_tolerance)

    @property
    def latency_is_right(self) -> bool:
        """Whether the latency is within 1 ms or 5 %."""
        allowed = max(LATENCY_TOLERANCE_S, LATENCY_TOLERANCE * self.asked_latency_s)
        return abs(self.measured_latency_s - self.asked_latency_s) <= allowed


@dataclass(frozen=True)
class UplinkCheck:
    """What a worker with an uplink limit sends when all destinations are busy."""

    worker: str
    asked_bytes_per_s: float
    measured_bytes_per_s: float
    rate_tolerance: float = RATE_TOLERANCE

    @property
    def rate_is_right(self) -> bool:
        """Whether the rate is within the tolerance."""
        return _near(self.measured_bytes_per_s, self.asked_bytes_per_s, self.rate_tolerance)


@dataclass(frozen=True)
class NetworkCheck:
    """Everything that was measured on one network, undilated."""

    topology: str
    dilation: float
    delay_by: str
    links: tuple[LinkCheck, ...]
    uplinks: tuple[UplinkCheck, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return asdict(self)

    @property
    def rates_are_right(self) -> bool:
        """Whether every rate is within the tolerance."""
        return all(link.rate_is_right for link in self.links) and all(up.rate_is_right for up in self.uplinks)

    def raise_if_rate_is_wrong(self) -> None:
        """Raise EmulationError for the worst rate that is not as asked, with the one that this machine can reach."""
        wrong: list[tuple[str, LinkCheck | UplinkCheck]] = []
        wrong += [(f"from '{one.source}' to '{one.target}'", one) for one in self.links if not one.rate_is_right]
        wrong += [(f"up from '{one.worker}'", one) for one in self.uplinks if not one.rate_is_right]
        if wrong:
            raise EmulationError(self._wrong_rate(*min(wrong, key=lambda one: _share(one[1]))))

    def raise_if_wrong(self) -> None:
        """Raise EmulationError for what is not as asked, rates first."""
        self.raise_if_rate_is_wrong()
        complaint = self.latency_complaint()
        if complaint:
            raise EmulationError(complaint)

    def latency_complaint(self) -> str:
        """Say which latency is not as asked, if any, and what to do."""
        return next((self._wrong_latency(link) for link in self.links if not link.latency_is_right), "")

    def _wrong_rate(self, where: str, worst: LinkCheck | UplinkCheck) -> str:
        got, asked = format_bandwidth(worst.measured_bytes_per_s), format_bandwidth(worst.asked_bytes_per_s)
        if _share(worst) > 1:
            return f"the emulated rate {where} is not held (got {got} of payload, expected {asked}); try again"
        dilation = math.ceil(self.dilation * 1.25 / max(_share(worst), 0.01))
        return (
            f"this machine can't carry the rate {where} (it reaches {got} of payload, expected {asked});"
            f" ask for less, or slow everything down: --dilation {dilation}"
        )

    def _wrong_latency(self, link: LinkCheck) -> str:
        got, asked = format_time(link.measured_latency_s), format_time(link.asked_latency_s)
        return (
            f"the emulated latency from '{link.source}' to '{link.target}' is wrong (got {got} one way, expected"
            f" {asked}); leave the machine a free processor, or slow everything down: --dilation {2 * self.dilation:g}"
        )


def check_network(
    network: EmulatedNetwork,
    *,
    all_pairs: bool = False,
    rate_tolerance: float = RATE_TOLERANCE,
    progress: Callable[[str], None] = lambda _: None,
) -> NetworkCheck:
    """Measure every ordered pair of a standing network, in rounds of disjoint pairs or with all pairs busy at once.

    A rate that is off by more than `rate_tolerance`, a share of what was asked, counts as wrong.
    """
    return _Measurement(network, rate_tolerance, progress).run(all_pairs)


class _Measurement:
    def __init__(self, network: EmulatedNetwork, rate_tolerance: float, progress: Callable[[str], None]) -> None:
        self._network, self._rate_tolerance, self._progress = network, rate_tolerance, progress
        self._topology, self._dilation = network.topology, network.dilation
        self._pairs = [(a.name, b.name) for a, b, _ in self._topology.pairs()]

    def run(self, all_pairs: bool) -> NetworkCheck:
        delays = self._delays()
        rounds = [self._pairs] if all_pairs else disjoint_rounds(self._topology)
        rates = self._rates(rounds)
        self._again(rates, all_pairs)
        self._delays_again(delays)
        self._network.raise_if_broken()
        links = tuple(self._link(pair, rates[pair], delays[pair], all_pairs) for pair in self._pairs)
        uplinks = tuple(self._uplinks())
        by = "netem" if self._network.has_netem else "nfqueue"
        return NetworkCheck(self._topology.name, self._dilation, by, links, uplinks)

    def _delays(self) -> dict[Pair, Delays]:
        """Time probes along all pairs at once: they are small; lossy networks get enough of them to count."""
        self._progress("latency")
        links = [link for *_, link in self._topology.pairs()]
        longest_s = max((link.latency_s + 6 * link.jitter_s for link in links), default=0.0) * self._dilation
        num = _NUM_LOSS_PROBES if any(link.loss or link.jitter_s for link in links) else _NUM_PROBES
        return one_way_delays(self._addressed(self._pairs), num, 0.005, longest_s)

    def _delays_again(self, delays: dict[Pair, Delays]) -> None:
        """Time late pairs again, and keep the least: a machine that is busy for a moment can only add to a delay."""
        for _ in range(_MOST_REPEATS):
            late = [pair for pair, one in delays.items() if not self._link(pair, 1.0, one, False).latency_is_right]
            if not late:
                return
            again = self._delays()
            delays |= {pair: min(delays[pair], again[pair], key=lambda one: one.latency_s) for pair in late}

    def _rates(self, rounds: list[list[Pair]]) -> dict[Pair, float]:
        rates: dict[Pair, float] = {}
        for i, pairs in enumerate(rounds):
            self._progress(f"rates, round {i + 1} of {len(rounds)}")
            rates |= self._measure(pairs)
        return rates

    def _measure(self, pairs: list[Pair], patience: int = 1) -> dict[Pair, float]:
        rtt_s = max(self._topology.link(a, b).latency_s + self._topology.link(b, a).latency_s for a, b in pairs)
        rtt_s *= self._dilation
        warm_up_s, timed_s = max(_LEAST_WARM_UP_S, _WARM_UP_RTTS * rtt_s), max(_LEAST_TIMED_S, _TIMED_RTTS * rtt_s)
        enough = {pair: self._asked(pair) * (1 - RATE_TOLERANCE / 2) / self._dilation for pair in pairs}
        measured = payload_rates(self._addressed(pairs), enough, patience * warm_up_s, patience * timed_s)
        return {pair: rate * self._dilation for pair, rate in measured.items()}

    def _again(self, rates: dict[Pair, float], all_pairs: bool) -> None:
        """Measure again, and longer, what was not right: by itself, or with all pairs busy as before; keep the best."""
        for _ in range(_MOST_REPEATS):
            links = {pair: self._link(pair, rate, _UNTIMED, all_pairs) for pair, rate in rates.items()}
            wrong = [pair for pair, link in links.items() if not link.rate_is_right]
            if not wrong:
                return
            for pairs in [self._pairs] if all_pairs else [[pair] for pair in wrong]:
                who = "all pairs again" if all_pairs else f"{pairs[0][0]} to {pairs[0][1]} again, alone and"
                self._progress(f"{who} longer")
                for pair, rate in self._measure(pairs, _PATIENCE).items():
                    rates[pair] = _nearer(rates[pair], rate, self._asked(pair))

    def _uplinks(self) -> Iterable[UplinkCheck]:
        for worker in self._topology.workers:
            fan = [pair for pair in self._pairs if pair[0] == worker.name]
            if worker.uplink_bytes_per_s is not None and len(fan) > 1:
                self._progress(f"uplink of {worker.name}")
                asked = PAYLOAD_SHARE * fan_out_bytes_per_s(self._topology, worker.name)
                sent = sum(self._measure(fan).values())
                for _ in range(_MOST_REPEATS):
                    if not _near(sent, asked, self._rate_tolerance):
                        sent = _nearer(sent, sum(self._measure(fan, _PATIENCE).values()), asked)
                yield UplinkCheck(worker.name, asked, sent, self._rate_tolerance)

    def _asked(self, pair: Pair) -> float:
        return self._topology.payload_bytes_per_s(*pair)

    def _addressed(self, pairs: Iterable[Pair]) -> dict[Pair, str]:
        return {pair: self._network.address(pair[1]) for pair in pairs}

    def _link(self, pair: Pair, rate: float, delays: Delays, all_pairs: bool) -> LinkCheck:
        link = self._topology.link(*pair)
        latency = (link.latency_s, delays.latency_s / self._dilation)
        jitter = (link.jitter_s, delays.jitter_s / self._dilation)
        shared = all_pairs and is_shared(self._topology, pair)
        unsteady = (*jitter, link.loss, delays.loss)
        return LinkCheck(*pair, self._asked(pair), rate, *latency, *unsteady, shared, self._rate_tolerance)


def disjoint_rounds(topology: Topology) -> list[list[Pair]]:
    """Deal all ordered pairs into rounds; in a round no two share a worker, nor a limit of a site."""
    limited = {site.name for site in topology.sites}
    rounds: list[tuple[set[str], list[Pair]]] = []
    for a, b, _ in topology.pairs():
        shared = {a.site, b.site} & limited if a.site != b.site else set()
        needs = {f"worker {a.name}", f"worker {b.name}", *(f"site {site}" for site in shared)}
        taken, pairs = next((one for one in rounds if not one[0] & needs), (set(), None))
        if pairs is None:
            pairs = []
            rounds.append((taken, pairs))
        taken |= needs
        pairs.append((a.name, b.name))
    return [pairs for _, pairs in rounds]


def is_shared(topology: Topology, pair: Pair) -> bool:
    """Say whether the pair passes a limit that other pairs pass too; which gets how much of it is for TCP to say."""
    a, b = topology.worker(pair[0]), topology.worker(pair[1])
    crossed = {a.site, b.site} if a.site != b.site else set()
    limited = any(site.name in crossed for site in topology.sites)
    return limited or a.uplink_bytes_per_s is not None or b.downlink_bytes_per_s is not None


def fan_out_bytes_per_s(topology: Topology, source: str) -> float:
    """Return what a worker sends when all others are its destinations: the least of links and limits on the way."""
    sites = {site.name: site for site in topology.sites}
    home = topology.worker(source)
    to_site: dict[str, float] = {}
    for worker in topology.workers:
        if worker.name != source:
            rate = topology.send_limit_bytes_per_s(source, worker.name)
            to_site[worker.site] = to_site.get(worker.site, 0.0) + rate
    inside = to_site.pop(home.site, 0.0)
    arriving = {name: sites[name].downlink_bytes_per_s if name in sites else None for name in to_site}
    outside = sum(min(rate, arriving[name] or rate) for name, rate in to_site.items())
    leaving = sites[home.site].uplink_bytes_per_s if home.site in sites else None
    return min(inside + min(outside, leaving or outside), home.uplink_bytes_per_s or math.inf)


def _share(check: LinkCheck | UplinkCheck) -> float:
    return check.measured_bytes_per_s / check.asked_bytes_per_s


def _near(measured: float, asked: float, tolerance: float) -> bool:
    return abs(measured - asked) <= tolerance * asked


def _nearer(first: float, second: float, asked: float) -> float:
    return min(first, second, key=lambda measured: abs(measured - asked))
