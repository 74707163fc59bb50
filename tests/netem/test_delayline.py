"""Delay lines: every packet waits its time, and what the kernel refuses is said."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from wantrain.errors import EmulationError, TopologyError
from wantrain.netem.delayline import DelayQueue, main
from wantrain.netem.emulate import EmulatedNetwork
from wantrain.netem.traffic import one_way_delays, payload_rates
from wantrain.topology import Topology


def two_workers(there: str, back: str) -> Topology:
    links = [
        {"from": "a", "to": "b", "bandwidth": "200 Mbit/s", "latency": there},
        {"from": "b", "to": "a", "bandwidth": "200 Mbit/s", "latency": back},
    ]
    return Topology.parse({"name": "t", "worker": [{"name": "a"}, {"name": "b"}], "link": links}, TopologyError, "t")


def medians_s(there: str, back: str, every_s: float) -> list[float]:
    """Return the median one-way delays of both directions of packets sent so often; runs in the sandbox."""
    with EmulatedNetwork(two_workers(there, back)) as network:
        pairs = {("a", "b"): network.address("b"), ("b", "a"): network.address("a")}
        delays = one_way_delays(pairs, round(0.6 / every_s), every_s, 0.2)
        return [delays[pair].latency_s for pair in pairs]


@pytest.mark.measured
@pytest.mark.parametrize("every_s", [0.01, 0.001])
@pytest.mark.parametrize(("there", "back"), [("1 ms", "1 ms"), ("20 ms", "100 ms")])
def test_latency_is_within_1_ms_or_5_percent_each_way(
    in_sandbox: Callable[..., Any], there: str, back: str, every_s: float
) -> None:
    asked_s = [float(text.split()[0]) / 1000 for text in (there, back)]
    for asked, measured in zip(asked_s, in_sandbox(medians_s, there, back, every_s), strict=True):
        assert abs(measured - asked) <= max(1e-3, 0.05 * asked)


def drops_of_a_full_link() -> int:
    """Fill a delayed link; return the packets that its queue dropped, by the kernel's count; runs in the sandbox."""
    with EmulatedNetwork(two_workers("20 ms", "20 ms")) as network:
        payload_rates({("a", "b"): network.address("b")}, {("a", "b"): 0.0}, 0.1, 1.0)
        shown = network.popen("b", ["cat", "/proc/net/netfilter/nfnetlink_queue"], stdout=subprocess.PIPE)
        columns = shown.communicate()[0].split()
        return int(columns[5]) + int(columns[6])


@pytest.mark.alone
def test_a_full_link_loses_nothing_in_the_delay_line(in_sandbox: Callable[..., Any]) -> None:
    assert in_sandbox(drops_of_a_full_link) == 0


def bind_twice() -> str:
    """Bind one queue number twice; runs in the sandbox."""
    first = DelayQueue(7, 0.01)
    try:
        DelayQueue(7, 0.01)
    except EmulationError as caught:
        return f"{first.number}: {caught}"
    return "bound"


def test_a_queue_that_is_taken_is_refused(in_sandbox: Callable[..., Any]) -> None:
    assert in_sandbox(bind_twice).startswith("7: the kernel refuses a packet queue (")


def readiness_of(queues: list[str]) -> list[Any]:
    """Start a delay line by itself and return its first line and whether it then goes on; runs in the sandbox."""
    argv = [sys.executable, "-m", main.__module__, *queues]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as line:
        assert line.stdout is not None
        said = line.stdout.readline()
        time.sleep(0.2)
        goes_on = line.poll() is None
        line.kill()
    return [said, goes_on]


def test_it_announces_readiness_and_serves_on(in_sandbox: Callable[..., Any]) -> None:
    assert in_sandbox(readiness_of, ["1:0.01", "2:0.02"]) == ["ready\n", True]
