"""How near `wantrain profile --links` comes to a network that is known: asked beside measured, link by link.

    python benchmarks/bench_profile.py

The network is `shared_uplink.toml`: eight workers in four sites, where one site's uplink and one worker's own are less
than their links together. A pair can't get more than the lines on its way, so that is what a pair is asked for. It is
right within 10 % of the rate, and 10 % or 2 ms of the latency.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import append_result
from wantrain.topology import Topology
from wantrain.units import format_bandwidth, format_time

BED = Path(__file__).resolve().parent / "shared_uplink.toml"
RATE_TOLERANCE, LATENCY_TOLERANCE, LATENCY_TOLERANCE_S = 0.1, 0.1, 2e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", type=Path, default=BED, help="the one that is emulated (default: shared_uplink)")
    parser.add_argument("--dilation", type=float, default=1.0, metavar="D", help="slow the network down D times")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    return parser.parse_args()


def measure(bed: Path, dilation: float) -> tuple[Topology, float]:
    """Emulate a topology and profile it; return what was written, and the seconds that all of it took."""
    with tempfile.TemporaryDirectory() as folder:
        out, slowed = Path(folder, "measured.toml"), ["--dilation", str(dilation)]
        wantrain = [sys.executable, "-m", "wantrain"]
        profile = [*wantrain, "profile", "--links", "--out", str(out), *slowed]
        began = time.monotonic()
        subprocess.run([*wantrain, "emulate", str(bed), *slowed, "--", *profile], check=True)
        return Topology.load(out), time.monotonic() - began


def compare(asked: Topology, measured: Topology) -> list[dict[str, Any]]:
    """Return asked and measured of every ordered pair."""
    return [
        {
            "pair": f"{a.name} → {b.name}",
            "asked_bytes_per_s": asked.send_limit_bytes_per_s(a.name, b.name),
            "measured_bytes_per_s": measured.link(a.name, b.name).bandwidth_bytes_per_s,
            "asked_latency_s": link.latency_s,
            "measured_latency_s": measured.link(a.name, b.name).latency_s,
        }
        for a, b, link in asked.pairs()
    ]


def shared_lines(topology: Topology) -> dict[str, float]:
    """Return every limit by who has it, a site being called by its first worker: sites that are found have no names."""
    firsts = {worker.site: worker.name for worker in reversed(topology.workers)}
    found: dict[str, float] = {}
    for who, place in (
        *((f"worker {worker.name}", worker) for worker in topology.workers),
        *((f"site of {firsts[site.name]}", site) for site in topology.sites),
    ):
        for way in ("uplink", "downlink"):
            rate = getattr(place, f"{way}_bytes_per_s")
            if rate is not None:
                found[f"{way}, {who}"] = rate
    return found


def is_rate_right(asked: float, measured: float) -> bool:
    return abs(measured - asked) <= RATE_TOLERANCE * asked


def is_latency_right(asked_s: float, measured_s: float) -> bool:
    return abs(measured_s - asked_s) <= max(LATENCY_TOLERANCE_S, LATENCY_TOLERANCE * asked_s)


def summary(pairs: list[dict[str, Any]], asked: dict[str, float], found: dict[str, float]) -> dict[str, Any]:
    """Return how far off the figures are, and which shared lines were found."""
    off = [abs(one["measured_bytes_per_s"] / one["asked_bytes_per_s"] - 1) for one in pairs]
    late_s = [abs(one["measured_latency_s"] - one["asked_latency_s"]) for one in pairs]
    return {
        "rate_error": {"median": statistics.median(off), "max": max(off)},
        "latency_error_s": {"median": statistics.median(late_s), "max": max(late_s)},
        "shared_asked": asked,
        "shared_found": found,
        "is_right": all(
            is_rate_right(one["asked_bytes_per_s"], one["measured_bytes_per_s"])
            and is_latency_right(one["asked_latency_s"], one["measured_latency_s"])
            for one in pairs
        )
        and set(asked) == set(found)
        and all(is_rate_right(rate, found[name]) for name, rate in asked.items()),
    }


def print_result(pairs: list[dict[str, Any]], result: dict[str, Any]) -> None:
    print(f"{'pair':<24}{'asked':>14}{'measured':>14}{'one way asked':>16}{'measured':>12}")
    for one in pairs:
        rates = "".join(f"{format_bandwidth(one[f'{what}_bytes_per_s']):>14}" for what in ("asked", "measured"))
        times = f"{format_time(one['asked_latency_s']):>16}{format_time(one['measured_latency_s']):>12}"
        print(f"{one['pair']:<24}{rates}{times}")
    for name in sorted({*result["shared_asked"], *result["shared_found"]}):
        asked, found = (result[f"shared_{what}"].get(name) for what in ("asked", "found"))
        print(f"{name}: " + ", ".join("none" if rate is None else format_bandwidth(rate) for rate in (asked, found)))
    rates, latencies = result["rate_error"], result["latency_error_s"]
    print(f"rates: off by {rates['median']:.1%} in the median, {rates['max']:.1%} at most")
    print(f"latencies: {format_time(latencies['median'])} in the median, {format_time(latencies['max'])} at most")
    print(f"{result['seconds']:.0f} s in all; {'all right' if result['is_right'] else 'NOT all right'}")


def main() -> None:
    """Emulate, profile, compare, print."""
    arguments = parse_arguments()
    asked = Topology.load(arguments.topology)
    measured, seconds = measure(arguments.topology, arguments.dilation)
    pairs = compare(asked, measured)
    result = summary(pairs, shared_lines(asked), shared_lines(measured)) | {"seconds": seconds}
    print_result(pairs, result)
    if arguments.save:
        setting = {"topology": arguments.topology.stem, "dilation": arguments.dilation}
        append_result("profile", setting | result | {"pairs": pairs})


if __name__ == "__main__":
    main()
