"""The measuring itself, on a network without any shape."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from wantrain.netem.traffic import Delays, in_namespace, one_way_delays, payload_rates


def test_delays_say_median_spread_and_loss() -> None:
    delays = Delays(4, (0.01, 0.02, 0.03))
    assert (delays.latency_s, delays.loss) == (0.02, 0.25)
    assert delays.jitter_s == pytest.approx(0.00816, abs=1e-5)
    assert Delays(4, ()).latency_s != Delays(4, ()).latency_s


def measure_a_loop() -> list[Any]:
    """Measure a namespace's loopback to itself; runs in the sandbox."""
    for command in ("ip netns add w", "ip -n w link set lo up"):
        subprocess.run(command.split(), check=True)
    pairs = {("w", "w"): "127.0.0.1"}
    rates = payload_rates(pairs, {("w", "w"): 1e6}, 1.0, 0.2)
    delays = one_way_delays(pairs, 20, 0.005, 0.1)["w", "w"]
    return [rates["w", "w"], delays.latency_s, delays.loss]


@pytest.mark.alone
def test_an_unshaped_loop_is_fast_and_near(in_sandbox: Callable[..., Any]) -> None:
    rate, latency_s, loss = in_sandbox(measure_a_loop)
    assert rate > 50e6
    assert latency_s < 2e-3
    assert loss == 0


def namespaces_around() -> list[bool]:
    """Return whether stepping into a namespace moves this thread there and back; runs in the sandbox."""
    subprocess.run(["ip", "netns", "add", "w"], check=True)
    own = links()
    with in_namespace("w"):
        subprocess.run(["ip", "link", "add", "x0", "type", "veth", "peer", "name", "x1"], check=True)
        inside = links()
    return ["x0" in inside, links() == own]


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def test_stepping_into_a_namespace_ends_with_the_block(in_sandbox: Callable[..., Any]) -> None:
    assert in_sandbox(namespaces_around) == [True, True]
