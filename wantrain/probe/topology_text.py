"""From what was measured to a topology file that says it as briefly as it is true.

A rate was payload; a topology's is the link's own, as tc and line speeds count it: payload / PAYLOAD_SHARE. Links of
the same two sites that agree become one rule, those that don't keep a rule of their own. Which lines are shared is
found in `shared_lines`.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterable, Iterator

from wantrain.errors import TopologyError
from wantrain.probe.measurement import Measurement, Pair, Participant
from wantrain.probe.shared_lines import SHORT, SharedLines
from wantrain.topology import PAYLOAD_SHARE, Topology

ALIKE = 0.05
"""Chosen: links within 5 % of each other are one rule; the measurement itself is no better."""

ALIKE_S = 0.5e-3
"""Chosen: so are latencies within 0.5 ms."""


def topology_text(made: Measurement, name: str, source: str, dilation: float = 1.0) -> str:
    """Return the topology as TOML: rates and latencies of the network itself, undilated.

    Raise TopologyError where what was measured is no topology.
    """
    shared = SharedLines(made)
    lines = [f'name = "{name}"', f'description = "{_description(made)}"', f'source = "{source}"']
    for worker in made.workers:
        lines += ["", *_worker_lines(worker, shared, dilation)]
    for site in made.sites:
        ends = [("uplink", shared.site_uplinks.get(site)), ("downlink", shared.site_downlinks.get(site))]
        if any(rate is not None for _, rate in ends):
            lines += ["", "[[site]]", f'name = "{site}"', *_limit_lines(ends, dilation)]
    lines += _Rules(made, shared.rates, dilation).lines()
    text = "\n".join(lines) + "\n"
    _check(text)
    return text


def _check(text: str) -> None:
    Topology.parse(tomllib.loads(text), TopologyError, "what was measured")


def _description(made: Measurement) -> str:
    return f"measured: {len(made.workers)} workers, {len(made.sites)} sites; latency is half of the round trip"


def _worker_lines(worker: Participant, shared: SharedLines, dilation: float) -> Iterator[str]:
    yield "[[worker]]"
    yield f'name = "{worker.name}"'
    yield f'site = "{worker.site}"'
    if worker.device != "cpu":
        yield f'device = "{worker.device}"'
    yield f'memory = "{worker.memory_bytes / 1e9:.4g} GB"'
    if worker.flops_per_s is not None:
        yield f'flops = "{flops_text(worker.flops_per_s)}"'
    if worker.codec_values_per_s is not None:
        yield f"codec_speed = {worker.codec_values_per_s:.4g}"
    if worker.address and not worker.address.startswith("127."):
        yield f'address = "{worker.address}"'
    ends = [("uplink", shared.uplinks.get(worker.name)), ("downlink", shared.downlinks.get(worker.name))]
    yield from _limit_lines(ends, dilation)


def _limit_lines(ends: Iterable[tuple[str, float | None]], dilation: float) -> Iterator[str]:
    for key, rate in ends:
        if rate is not None:
            yield f'{key} = "{_rate_text(rate * dilation)}"'


def flops_text(flops_per_s: float) -> str:
    """Return a computing speed as a topology file has it."""
    return f"{flops_per_s / 1e12:.5g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.5g} GFLOP/s"


def _rate_text(payload_bytes_per_s: float) -> str:
    return f"{payload_bytes_per_s * 8e-6 / PAYLOAD_SHARE:.4g} Mbit/s"


class _Rules:
    """The [[link]] tables: one for two sites where their links agree, else one by one."""

    def __init__(self, made: Measurement, rates: dict[Pair, float], dilation: float) -> None:
        self._made, self._rates, self._dilation = made, rates, dilation

    def lines(self) -> Iterator[str]:
        """Yield the tables' lines."""
        sites = list(self._made.sites)
        for i, a in enumerate(sites):
            yield from self._both_ways(a, a) if len(self._made.sites[a]) > 1 else ()
            for b in sites[i + 1 :]:
                yield from self._both_ways(a, b)

    def _both_ways(self, a: str, b: str) -> Iterator[str]:
        there, back = self._pairs(a, b), self._pairs(b, a)
        both = list(dict.fromkeys([*there, *back]))
        if self._alike(self._typical(there, self._rates), self._typical(back, self._rates)):
            yield from self._rule(f'within = "{a}"' if a == b else f'between = ["{a}", "{b}"]', both)
            return
        yield from self._rule(f'from = "{a}"\nto = "{b}"', there)
        yield from self._rule(f'from = "{b}"\nto = "{a}"', back)

    def _rule(self, ends: str, pairs: list[Pair]) -> Iterator[str]:
        """Yield a rule for some pairs, and one each for those that are unlike the others."""
        rate, latency_s = self._typical(pairs, self._rates), self._typical(pairs, self._made.latency_s)
        yield from self._table(ends, rate, latency_s, pairs)
        for pair in pairs:
            own_s = self._made.latency_s[pair]
            is_late = abs(own_s - latency_s) > max(ALIKE_S * self._dilation, ALIKE * latency_s)
            if is_late or not self._alike(self._rates[pair], rate):
                yield from self._table(f'from = "{pair[0]}"\nto = "{pair[1]}"', self._rates[pair], own_s, [pair])

    def _table(self, ends: str, rate: float, latency_s: float, pairs: list[Pair]) -> Iterator[str]:
        yield ""
        yield "[[link]]"
        yield ends
        single = self._typical(pairs, self._made.single_bytes_per_s)
        note = "" if single >= SHORT * rate else f"  # one connection reaches {_rate_text(single * self._dilation)}"
        yield f'bandwidth = "{_rate_text(rate * self._dilation)}"{note}'
        yield f'latency = "{latency_s / self._dilation * 1e3:.4g} ms"'

    def _pairs(self, a: str, b: str) -> list[Pair]:
        return [(x, y) for x in self._made.sites[a] for y in self._made.sites[b] if x != y]

    def _typical(self, pairs: Iterable[Pair], values: dict[Pair, float]) -> float:
        return statistics.median_low(values[pair] for pair in pairs)

    def _alike(self, one: float, other: float) -> bool:
        return abs(one - other) <= ALIKE * max(one, other)
