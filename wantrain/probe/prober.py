"""The coordinator's part of a measurement: what is measured when, and until it is steady.

    round trips      all pairs at once: they are small
    rates            rounds of disjoint pairs (`rounds`), each way by itself: over one connection, then over several
    rates, alone     one pair of every two sites, in rounds of disjoint sites: where a pair is faster so than in
                     company, the company shared a line; then, one by one, the pairs that are unlike that one
    in all           each worker to all others and from all others at once, then each site to all others and from them:
                     shared lines are invisible pair by pair

A rate is read at the receivers, by their own clocks: two counts and the time between. TCP needs a while to find the
rate, and how long is not known before: a measurement ends as soon as two windows in a row agree. One connection is
measured both ways at once: it is there to show what a connection's buffers and losses leave of the link.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from wantrain.probe.control import Message, Workers
from wantrain.probe.measurement import Measurement, Pair, Participant, find_sites, turned
from wantrain.probe.rounds import tournament
from wantrain.probe.shared_lines import corrected_rates, short_sums, unlike_pairs

NUM_CONNECTIONS = 8
"""Chosen: with Linux' default buffers they fill 1 Gbit/s over 80 ms one way; more would mostly add work."""

_NUM_PINGS, _NUM_FIRST_PINGS = 15, 2
"""The first ones find hardware addresses and wake processors; they are not counted."""

_LATENCY_LOOKS = 3

_LEAST_WARM_UP_S, _WARM_UP_RTTS = 0.3, 8
"""Chosen: slow start doubles every round trip, so eight of them reach any rate that is steady afterwards."""

_LEAST_WINDOW_S, _WINDOW_RTTS = 0.25, 2
_MOST_WINDOWS = 8
_SUM_WINDOW_S, _SUM_AGREEING, _SUM_READ = 0.4, 3, 5
"""Chosen: a sum is steady when three windows agree, else the last five of all are read. On a full shared line packets
are lost, and what waits behind a gap is counted when it has closed: half a second is off by 10 % then (measured)."""

_MORE_LOOKS = 2
"""Chosen: what falls short is looked at thrice, so that a machine that is busy for a moment doesn't pass for a line."""

_WHOLE = 0.92
"""A sum that reaches this share of its links need not be known better: nothing is shared."""

_STEADY = 0.05
"""Chosen: windows that agree within 5 % are steady; a busy machine seldom gives less."""

_SINGLE_IS_ENOUGH = 0.95
"""Where one connection reaches this share of what several do, one is used in what follows."""

_MOST_AGAIN = 2
"""Chosen: pairs that are looked at again, for each worker: a matter of seconds."""

_MOST_SITE_PEERS = 4
"""Chosen: workers elsewhere that each worker of a site is busy with when the site as a whole is measured."""

Flow = tuple[Pair, int]
"""A pair and its number of connections."""


class Prober:
    """Measures all links and lines between the workers that have met."""

    def __init__(self, workers: Workers, participants: Sequence[Participant], progress: Callable[[str], None]) -> None:
        self._workers, self._participants, self._progress = workers, participants, progress
        self._names = [one.name for one in participants]
        self._rank = {name: rank for rank, name in enumerate(self._names)}
        self._latency_s: dict[Pair, float] = {}
        self._num_connections: dict[Pair, int] = {}
        self._num_streams = 0

    def run(self) -> Measurement:
        """Measure everything."""
        self._latency_s = self._latencies()
        found = find_sites(self._names, self._latency_s)
        workers = tuple(dataclasses.replace(one, site=one.site or found[one.name]) for one in self._participants)
        rounds = tournament(self._names)
        single = self._rates("one connection", [[*pairs, *turned(pairs)] for pairs in rounds], 1)
        several = self._rates(f"{NUM_CONNECTIONS} connections", each_way(rounds), NUM_CONNECTIONS)
        self._num_connections = {
            pair: 1 if single[pair] >= _SINGLE_IS_ENOUGH * rate else NUM_CONNECTIONS for pair, rate in several.items()
        }
        made = Measurement(workers, self._latency_s, single, several, NUM_CONNECTIONS)
        made = dataclasses.replace(made, alone_bytes_per_s=self._alone(made))
        made = dataclasses.replace(made, alone_bytes_per_s=made.alone_bytes_per_s | self._again(made))
        sums: dict[str, Any] = {what: self._in_all(what, groups, made) for what, groups in busy_groups(made).items()}
        made = dataclasses.replace(made, site_flows=site_flows(made), **sums)
        return self._looked_at_again(made)

    def _looked_at_again(self, made: Measurement) -> Measurement:
        """Measure anew what looks like a shared line: where one look is as much as the links, there is none."""
        looks: dict[tuple[str, str], list[float]] = {}
        groups = busy_groups(made)
        for _ in range(_MORE_LOOKS):
            for what, name in short_sums(made):
                again = self._in_all(what, {name: groups[what][name]}, made)[name]
                looks.setdefault((what, name), [getattr(made, what)[name]]).append(again)
            made = _with_sums(made, {key: max(values) for key, values in looks.items()})
        still = short_sums(made)
        return _with_sums(made, {key: statistics.median(values) for key, values in looks.items() if key in still})

    def _latencies(self) -> dict[Pair, float]:
        """Return half of each round trip, the least of some looks: a machine that is busy for a moment only adds."""
        self._progress("round trips")
        looks = [self._round_trips_s() for _ in range(_LATENCY_LOOKS)]
        return {pair: min(look[pair] for look in looks) / 2 for pair in looks[0]}

    def _round_trips_s(self) -> dict[Pair, float]:
        """Return each pair's median; of two workers the first pings the second."""
        last = len(self._names) - 1
        commands: dict[int, Message] = {
            rank: {"do": "ping", "ranks": list(range(rank + 1, last + 1)), "count": _NUM_PINGS} for rank in range(last)
        }
        found = {}
        for rank, reply in self._workers.ask(commands).items():
            for other, times in zip(self._names[rank + 1 :], reply["round_trips_s"], strict=True):
                median_s = statistics.median(times[_NUM_FIRST_PINGS:])
                found[self._names[rank], other] = found[other, self._names[rank]] = median_s
        return found

    def _rates(
        self, what: str, rounds: Sequence[Sequence[Pair]], num_connections: int | None = None
    ) -> dict[Pair, float]:
        """Measure the pairs of each round at once, over so many connections, or as many as each was found to need."""
        rates: dict[Pair, float] = {}
        for i, pairs in enumerate(rounds):
            self._progress(f"rates over {what}, round {i + 1} of {len(rounds)}")
            flows = [(pair, num_connections or self._num_connections[pair]) for pair in pairs]
            rates |= self._measure(flows)
        return rates

    def _alone(self, made: Measurement) -> dict[Pair, float]:
        """Measure a pair of every two sites, both ways, where some site has several workers."""
        if all(len(names) == 1 for names in made.sites.values()):
            return {}
        firsts = [names[0] for names in made.sites.values()]
        return self._rates("a line alone", each_way(tournament(firsts)))

    def _again(self, made: Measurement) -> dict[Pair, float]:
        """Measure pairs by themselves that are unlike the one that stands for their two sites; not all in a large net.

        In company on a full line TCP's queues fill and drain, and a pair's rate is anything for a second.
        """
        rounds = [[pair] for pair in unlike_pairs(made)[: _MOST_AGAIN * len(self._names)]]
        return self._rates("a line alone again", rounds)

    def _in_all(self, what: str, groups: dict[str, tuple[Pair, ...]], made: Measurement) -> dict[str, float]:
        """Keep all pairs of each group busy at once; return their sums."""
        rates, sums = corrected_rates(made), {}
        for name, pairs in groups.items():
            self._progress(f"in all, {name} {'sends' if 'sent' in what else 'receives'}")
            flows = [(pair, self._num_connections[pair]) for pair in pairs]
            sums[name] = sum(self._measure(flows, _WHOLE * sum(rates[pair] for pair in pairs)).values())
        return sums

    def _measure(self, flows: Sequence[Flow], whole: float | None = None) -> dict[Pair, float]:
        """Keep some pairs busy until each is steady, or, with `whole`, their sum is or reaches it; return the rates."""
        rtt_s = max(2 * self._latency_s[pair] for pair, _ in flows)
        stream = self._start(flows)
        counts = _Counts([pair for pair, _ in flows], whole)
        targets = {self._rank[target] for (_, target), _ in flows}
        window_s = max(_LEAST_WINDOW_S if whole is None else _SUM_WINDOW_S, _WINDOW_RTTS * rtt_s)
        warm_s = time.monotonic() + max(_LEAST_WARM_UP_S, _WARM_UP_RTTS * rtt_s)
        for _ in range(_MOST_WINDOWS):
            time.sleep(window_s)
            counts.add(self._names, self._workers.ask({rank: {"do": "count", "stream": stream} for rank in targets}))
            if counts.are_enough and time.monotonic() > warm_s:
                break
        sources = {self._rank[source] for (source, _), _ in flows}
        self._workers.ask({rank: {"do": "stop", "stream": stream} for rank in sources})
        return counts.rates()

    def _start(self, flows: Sequence[Flow]) -> int:
        """Let the sources begin; return the stream's number."""
        self._num_streams += 1
        commands: dict[int, Message] = {}
        for (source, target), num_connections in flows:
            command = commands.setdefault(self._rank[source], {"do": "send", "stream": self._num_streams, "to": []})
            command["to"].append([self._rank[target], num_connections])
        self._workers.ask(commands)
        return self._num_streams


class _Counts:
    """What has come so far, window by window, of each pair of a measurement."""

    def __init__(self, pairs: Sequence[Pair], whole: float | None) -> None:
        """With `whole` only the sum of all pairs counts, and need not be known better where it reaches that much."""
        self._pairs, self._whole = pairs, whole
        self._samples: list[dict[Pair, tuple[float, int]]] = []

    def add(self, names: Sequence[str], replies: dict[int, Message]) -> None:
        """Take the replies of all targets."""
        sample = {}
        for target, reply in replies.items():
            received = {names[source]: count for source, count in reply["received"]}
            for pair in self._pairs:
                if pair[1] == names[target]:
                    sample[pair] = (reply["now_s"], received.get(pair[0], 0))
        self._samples.append(sample)

    def rates(self) -> dict[Pair, float]:
        """Return the rate of each pair over the last windows."""
        if self._whole is None or self.are_enough:
            return self._over(2, 0)
        return self._over(_SUM_READ, 0)

    @property
    def are_enough(self) -> bool:
        """Whether the last windows agree: two of each pair, or three of the sum, or the sum is as much as can be."""
        num_agreeing = 2 if self._whole is None else _SUM_AGREEING
        windows = [self._over(1, back) for back in range(min(num_agreeing, len(self._samples) - 1))]
        if self._whole is None:
            series = [[window[pair] for window in windows] for pair in self._pairs]
        else:
            series = [[sum(window.values()) for window in windows]]
            if windows and series[0][0] >= self._whole:
                return True
        return len(windows) == num_agreeing and all(min(one) >= (1 - _STEADY) * max(one) for one in series)

    def _over(self, num_windows: int, back: int) -> dict[Pair, float]:
        """Return the rates over so many windows, the last of which is `back` before the end."""
        last = len(self._samples) - 1 - back
        begin, end = self._samples[max(0, last - num_windows)], self._samples[last]
        return {pair: (end[pair][1] - begin[pair][1]) / (end[pair][0] - begin[pair][0]) for pair in self._pairs}


def busy_groups(made: Measurement) -> dict[str, dict[str, tuple[Pair, ...]]]:
    """Return what is kept busy for each of the measurement's sums, by its name there."""
    names = [worker.name for worker in made.workers]
    fans = {name: tuple((name, other) for other in names if other != name) for name in names}
    flows = site_flows(made)
    return {
        "sent_bytes_per_s": fans,
        "received_bytes_per_s": {name: turned(pairs) for name, pairs in fans.items()},
        "site_sent_bytes_per_s": flows,
        "site_received_bytes_per_s": {name: turned(pairs) for name, pairs in flows.items()},
    }


def _with_sums(made: Measurement, sums: dict[tuple[str, str], float]) -> Measurement:
    for (what, name), rate in sums.items():
        made = dataclasses.replace(made, **{what: getattr(made, what) | {name: rate}})
    return made


def each_way(rounds: Sequence[Sequence[Pair]]) -> list[Sequence[Pair]]:
    """Return every round twice: as it is, and turned around."""
    return [way for pairs in rounds for way in (pairs, turned(pairs))]


def site_flows(made: Measurement) -> dict[str, tuple[Pair, ...]]:
    """Return the pairs to keep busy to fill each site's line: each of its workers with a few elsewhere, dealt in turn.

    Sites of one worker are left out: their line is the worker's own.
    """
    flows = {}
    for site, names in made.sites.items():
        outside = [worker.name for worker in made.workers if worker.site != site]
        if len(names) > 1 and outside:
            num_peers = min(_MOST_SITE_PEERS, len(outside))
            flows[site] = tuple(
                (name, outside[(i * num_peers + k) % len(outside)])
                for i, name in enumerate(names)
                for k in range(num_peers)
            )
    return flows
