"""Which lines several links share, found from what workers and sites send and receive in all.

A sum that falls short of its links is held by something: by a line at this end, or by one at the other end. What the
other end can do at most was measured too, so a line is only found where that does not explain it. With s(w) what worker
w sends to all others at once, r(w) what it receives from all at once, and l(pairs) the sum of links:

    a site's uplink      its sum < 0.9 · min( Σ own workers min(s(w), l), Σ others min(r(w), l),
                                              Σ other sites min(their sum of receiving, l) )
    a site's downlink    the mirror
    a worker's uplink    s(w) < 0.9 · ( l(inside) + min(uplink of its site, Σ other sites min(l, its downlink)) )
    a worker's downlink  the mirror

Between two sites alone an uplink of one and a downlink of the other are the same to every measurement, and to every
plan; then the last line of the first formula is left out, and it is called an uplink. A line that is not slower than
each of its links by itself can't be told from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from wantrain.probe.measurement import Measurement, Pair, turned

SHORT = 0.9
"""Chosen: a sum below this share of its links is a limit; TCP's shares of a full line vary by less."""

IN_COMPANY = 1.1
"""Chosen: a pair that is faster alone by this much shared a line with its company."""

UNLIKE = 0.1
"""Chosen: pairs of two sites that differ by more than a tenth are looked at again."""


class SharedLines:
    """The limits found, payload bytes per second by name; what has none is left out. `rates` are the links' own."""

    def __init__(self, made: Measurement) -> None:
        self._made = made
        self._site = {worker.name: worker.site for worker in made.workers}
        self.rates = corrected_rates(made)
        self.site_uplinks: dict[str, float] = {}
        self.site_downlinks: dict[str, float] = {}
        for site, flows in made.site_flows.items():
            self._find_site_uplink(site, flows)
        for site, flows in made.site_flows.items():
            self._find_site_downlink(site, turned(flows))
        self.uplinks = {name: rate for name, rate in made.sent_bytes_per_s.items() if self._holds_up(name, rate)}
        self.downlinks = {
            name: rate for name, rate in made.received_bytes_per_s.items() if self._holds_down(name, rate)
        }

    def _find_site_uplink(self, site: str, flows: Iterable[Pair]) -> None:
        reached, receiving = self._made.site_sent_bytes_per_s[site], self._site_sums(is_up=False)
        far = self._by_site(flows, 1, receiving if len(self._made.sites) > 2 else {})
        if reached < SHORT * min(self._of_ends(flows), far):
            self.site_uplinks[site] = reached

    def _find_site_downlink(self, site: str, flows: Iterable[Pair]) -> None:
        reached, sending = self._made.site_received_bytes_per_s[site], self._site_sums(is_up=True)
        far = self._by_site(flows, 0, sending if len(self._made.sites) > 2 else self.site_uplinks)
        if reached < SHORT * min(self._of_ends(flows), far):
            self.site_downlinks[site] = reached

    def _site_sums(self, is_up: bool) -> dict[str, float]:
        """Return what each site sends, or receives, in all; a site of one worker does what its worker does."""
        made = self._made
        sites = made.site_sent_bytes_per_s if is_up else made.site_received_bytes_per_s
        workers = made.sent_bytes_per_s if is_up else made.received_bytes_per_s
        return {site: workers[names[0]] for site, names in made.sites.items() if len(names) == 1} | sites

    def _of_ends(self, flows: Iterable[Pair]) -> float:
        """Return what the workers at both ends of some busy pairs let through."""
        sending = {name: self._total(pair for pair in flows if pair[0] == name) for name, _ in flows}
        receiving = {name: self._total(pair for pair in flows if pair[1] == name) for _, name in flows}
        return min(
            sum(min(rate, self._made.sent_bytes_per_s[name]) for name, rate in sending.items()),
            sum(min(rate, self._made.received_bytes_per_s[name]) for name, rate in receiving.items()),
        )

    def _by_site(self, flows: Iterable[Pair], end: int, limits: dict[str, float]) -> float:
        """Return what links let through under the limits of the sites at one end of them."""
        by_site: dict[str, float] = {}
        for pair in flows:
            site = self._site[pair[end]]
            by_site[site] = by_site.get(site, 0.0) + self.rates[pair]
        return sum(min(rate, limits.get(site, math.inf)) for site, rate in by_site.items())

    def _holds_up(self, name: str, reached: float) -> bool:
        flows = [pair for pair in self.rates if pair[0] == name]
        return self._is_short(name, reached, flows, 1, self.site_uplinks, self.site_downlinks)

    def _holds_down(self, name: str, reached: float) -> bool:
        flows = [pair for pair in self.rates if pair[1] == name]
        return self._is_short(name, reached, flows, 0, self.site_downlinks, self.site_uplinks)

    def _is_short(
        self, name: str, reached: float, flows: list[Pair], far: int, near_limits: dict[str, float],
        far_limits: dict[str, float],
    ) -> bool:  # fmt: skip
        home = self._site[name]
        inside = self._total(pair for pair in flows if self._site[pair[far]] == home)
        outside = self._by_site([pair for pair in flows if self._site[pair[far]] != home], far, far_limits)
        expected = inside + min(outside, near_limits.get(home, math.inf))
        return len(flows) > 1 and reached < SHORT * expected

    def _total(self, flows: Iterable[Pair]) -> float:
        return sum(self.rates[pair] for pair in flows)


def corrected_rates(made: Measurement) -> dict[Pair, float]:
    """Return each pair's rate: that of the pair alone where it was measured so.

    Pairs of two sites that are slowed by their company, as the one shows that was measured both ways, get its rate.
    """
    site = {worker.name: worker.site for worker in made.workers}
    slowed = {
        (site[a], site[b]): rate
        for (a, b), rate in made.alone_bytes_per_s.items()
        if rate > IN_COMPANY * made.best_bytes_per_s((a, b))
    }
    together = {
        (a, b): max(made.best_bytes_per_s((a, b)), slowed.get((site[a], site[b]), 0.0)) for a, b in made.latency_s
    }
    return together | made.alone_bytes_per_s


def unlike_pairs(made: Measurement) -> list[Pair]:
    """Return the pairs whose rate differs from that of the pair that was measured alone for their two sites."""
    site = {worker.name: worker.site for worker in made.workers}
    alone = {(site[a], site[b]): rate for (a, b), rate in made.alone_bytes_per_s.items()}
    rates = corrected_rates(made)
    return [(a, b) for (a, b), rate in rates.items() if abs(rate - alone.get((site[a], site[b]), rate)) > UNLIKE * rate]


def short_sums(made: Measurement) -> list[tuple[str, str]]:
    """Return which sums of a measurement show a shared line: the field's name, and whose it is."""
    shared = SharedLines(made)
    found = {
        "sent_bytes_per_s": shared.uplinks,
        "received_bytes_per_s": shared.downlinks,
        "site_sent_bytes_per_s": shared.site_uplinks,
        "site_received_bytes_per_s": shared.site_downlinks,
    }
    return [(what, name) for what, limits in found.items() for name in limits]
