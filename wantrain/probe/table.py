"""What was measured, as lines to read and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wantrain.probe.measurement import Measurement
from wantrain.probe.shared_lines import SharedLines
from wantrain.topology import PAYLOAD_SHARE
from wantrain.units import format_bandwidth, format_time


def table_lines(made: Measurement, dilation: float = 1.0) -> Iterator[str]:
    """Yield the pairs' figures, and the shared lines that were found; rates are the links' own, undilated."""
    several = f"{made.num_connections} connections"
    yield f"{'from':<16}{'to':<16}{'one way':>10}{'1 connection':>15}{several:>15}"
    for (source, target), latency_s in sorted(made.latency_s.items(), key=lambda one: _order(made, *one[0])):
        rates = (made.single_bytes_per_s[source, target], made.several_bytes_per_s[source, target])
        shown = "".join(f"{_own(rate, dilation):>15}" for rate in rates)
        yield f"{source:<16}{target:<16}{format_time(latency_s / dilation):>10}{shown}"
    found = list(_shared(SharedLines(made), dilation))
    yield from found or ["no shared line is slower than its links together"]


def as_json(made: Measurement, dilation: float = 1.0) -> dict[str, Any]:
    """Return the figures of every pair and line as plain values, undilated."""
    shared = SharedLines(made)

    def own(rates: dict[str, float]) -> dict[str, float]:
        return {name: rate * dilation / PAYLOAD_SHARE for name, rate in rates.items()}

    links = [
        {
            "source": source,
            "target": target,
            "latency_s": latency_s / dilation,
            "bandwidth_bytes_per_s": shared.rates[source, target] * dilation / PAYLOAD_SHARE,
            "single_bytes_per_s": made.single_bytes_per_s[source, target] * dilation / PAYLOAD_SHARE,
            "several_bytes_per_s": made.several_bytes_per_s[source, target] * dilation / PAYLOAD_SHARE,
        }
        for (source, target), latency_s in made.latency_s.items()
    ]
    return {
        "sites": made.sites,
        "num_connections": made.num_connections,
        "dilation": dilation,
        "links": links,
        "uplinks": own(shared.uplinks),
        "downlinks": own(shared.downlinks),
        "site_uplinks": own(shared.site_uplinks),
        "site_downlinks": own(shared.site_downlinks),
    }


def _order(made: Measurement, source: str, target: str) -> tuple[int, int]:
    names = [worker.name for worker in made.workers]
    return names.index(source), names.index(target)


def _shared(shared: SharedLines, dilation: float) -> Iterator[str]:
    for what, limits in (
        ("uplink of site", shared.site_uplinks),
        ("downlink of site", shared.site_downlinks),
        ("uplink of", shared.uplinks),
        ("downlink of", shared.downlinks),
    ):
        for name, rate in limits.items():
            yield f"{what} {name}: {_own(rate, dilation)}, shared by all its links"


def _own(payload_bytes_per_s: float, dilation: float) -> str:
    return format_bandwidth(payload_bytes_per_s * dilation / PAYLOAD_SHARE)
