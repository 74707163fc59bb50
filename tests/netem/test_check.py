"""Asked beside measured: the rounds, the verdicts, and the figures that an emulated network must give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from wantrain.errors import EmulationError, TopologyError
from wantrain.netem.check import (
    LinkCheck,
    NetworkCheck,
    UplinkCheck,
    check_network,
    disjoint_rounds,
    fan_out_bytes_per_s,
    is_shared,
)
from wantrain.netem.emulate import EmulatedNetwork
from wantrain.topology import Topology

GOOD = LinkCheck("a", "b", 100e6, 99e6, 0.02, 0.0204)


def four_workers(bandwidth: str, latency: str = "1 ms", uplink: str | None = None, **link: str) -> dict[str, Any]:
    limit = {} if uplink is None else {"uplink": uplink}
    workers = [{"name": name, "site": "s", **limit} for name in "abcd"]
    return {
        "name": "t",
        "worker": workers,
        "link": [{"within": "s", "bandwidth": bandwidth, "latency": latency} | link],
    }


def two_limited_sites() -> Topology:
    data = {
        "name": "t",
        "worker": [{"name": name, "site": site} for name, site in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))],
        "site": [{"name": "x", "uplink": "30 Mbit/s"}],
        "link": [
            {"within": "x", "bandwidth": "100 Mbit/s"},
            {"within": "y", "bandwidth": "100 Mbit/s"},
            {"between": ["x", "y"], "bandwidth": "20 Mbit/s"},
        ],
    }
    return Topology.parse(data, TopologyError, "t")


def test_rounds_cover_every_ordered_pair_once_and_share_no_worker() -> None:
    topology = Topology.parse(four_workers("1 Gbit/s"), TopologyError, "t")
    rounds = disjoint_rounds(topology)
    assert sorted(pair for pairs in rounds for pair in pairs) == sorted(
        (a.name, b.name) for a, b, _ in topology.pairs()
    )
    assert len(rounds) == 6
    for pairs in rounds:
        names = [name for pair in pairs for name in pair]
        assert len(set(names)) == len(names)


def test_no_two_pairs_of_a_round_share_a_site_limit() -> None:
    for pairs in disjoint_rounds(two_limited_sites()):
        assert sum({a, b} & {"a", "b"} != set() and {a, b} & {"c", "d"} != set() for a, b in pairs) <= 1


def test_a_fan_out_is_held_by_the_sites_uplink() -> None:
    assert fan_out_bytes_per_s(two_limited_sites(), "a") == pytest.approx((100e6 + 30e6) / 8)
    assert fan_out_bytes_per_s(two_limited_sites(), "c") == pytest.approx((100e6 + 2 * 20e6) / 8)


def test_pairs_that_cross_a_limited_site_share_it() -> None:
    topology = two_limited_sites()
    assert [is_shared(topology, pair) for pair in (("a", "b"), ("a", "c"), ("d", "a"), ("c", "d"))] == [0, 1, 1, 0]


def test_a_good_network_passes() -> None:
    check = NetworkCheck("t", 1.0, "nfqueue", (GOOD,), (UplinkCheck("a", 100e6, 96e6),))
    check.raise_if_wrong()
    assert check.rates_are_right
    assert check.latency_complaint() == ""


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (
            replace(GOOD, measured_bytes_per_s=50e6),
            r"reaches 400 Mbit/s of payload, expected 800 Mbit/s\).*--dilation 3",
        ),
        (replace(GOOD, measured_bytes_per_s=120e6), "from 'a' to 'b' is not held"),
        (replace(GOOD, measured_latency_s=0.0215), "latency from 'a' to 'b' is wrong .got 21.5 ms one way"),
        (replace(GOOD, measured_latency_s=float("nan")), "latency from 'a' to 'b' is wrong"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(link: LinkCheck, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        NetworkCheck("t", 1.0, "nfqueue", (GOOD, link)).raise_if_wrong()


def test_an_uplink_that_is_not_held_is_wrong() -> None:
    check = NetworkCheck("t", 1.0, "nfqueue", (GOOD,), (UplinkCheck("a", 100e6, 287e6),))
    with pytest.raises(EmulationError, match="up from 'a' is not held"):
        check.raise_if_wrong()


def test_the_rate_of_a_lossy_or_shared_link_is_shown_but_not_judged() -> None:
    slow = replace(GOOD, measured_bytes_per_s=1e6)
    assert not slow.rate_is_right
    assert replace(slow, asked_loss=0.01).rate_is_right
    assert replace(slow, was_shared=True).rate_is_right


def measure(data: dict[str, Any], dilation: float, all_pairs: bool) -> dict[str, Any]:
    """Build, check and judge a network; runs in the sandbox."""
    topology = Topology.parse(data, TopologyError, "t")
    with EmulatedNetwork(topology, dilation) as network:
        check = check_network(network, all_pairs=all_pairs)
    check.raise_if_wrong()
    return check.as_json()


@pytest.mark.measured
def test_rates_hold_while_all_pairs_are_busy(in_sandbox: Callable[..., Any]) -> None:
    measured = in_sandbox(measure, four_workers("50 Mbit/s"), 1, True)
    assert len(measured["links"]) == 12
    assert json.loads(json.dumps(measured)) == measured


@pytest.mark.measured
def test_an_uplink_holds_while_a_worker_sends_to_all_others(in_sandbox: Callable[..., Any]) -> None:
    data = four_workers("50 Mbit/s", uplink="60 Mbit/s")
    data["worker"] = [data["worker"][0], *({"name": name, "site": "s"} for name in "bc")]
    measured = in_sandbox(measure, data, 1, False)
    (uplink,) = measured["uplinks"]
    assert uplink["asked_bytes_per_s"] == pytest.approx(0.955 * 60e6 / 8)


@pytest.mark.measured
def test_figures_of_a_dilated_network_are_undilated(in_sandbox: Callable[..., Any]) -> None:
    data = four_workers("400 Mbit/s", "10 ms")
    data["worker"] = data["worker"][:2]
    measured = in_sandbox(measure, data, 8, False)
    assert measured["dilation"] == 8
    assert measured["links"][0]["measured_bytes_per_s"] == pytest.approx(0.955 * 50e6, rel=0.05)
    assert measured["links"][0]["measured_latency_s"] == pytest.approx(0.01, rel=0.05)


@pytest.mark.measured
def test_asymmetric_pairs_have_each_their_own_rate_and_latency(in_sandbox: Callable[..., Any]) -> None:
    links = [
        {"from": "a", "to": "b", "bandwidth": "80 Mbit/s", "latency": "5 ms"},
        {"from": "b", "to": "a", "bandwidth": "20 Mbit/s", "latency": "30 ms"},
    ]
    measured = in_sandbox(measure, {"name": "t", "worker": [{"name": "a"}, {"name": "b"}], "link": links}, 1, False)
    there, back = measured["links"]
    assert there["measured_bytes_per_s"] > 3 * back["measured_bytes_per_s"]
    assert back["measured_latency_s"] - there["measured_latency_s"] == pytest.approx(0.025, abs=2e-3)


@pytest.mark.slow
@pytest.mark.measured
@pytest.mark.parametrize("bandwidth", ["10 Mbit/s", "100 Mbit/s", "300 Mbit/s"])
def test_all_twelve_pairs_of_four_workers_get_their_rate_at_once(
    in_sandbox: Callable[..., Any], bandwidth: str
) -> None:
    assert len(in_sandbox(measure, four_workers(bandwidth, "5 ms"), 1, True)["links"]) == 12


@pytest.mark.slow
@pytest.mark.measured
@pytest.mark.parametrize("latency", ["1 ms", "20 ms", "100 ms"])
def test_one_pair_at_a_time_gets_a_gigabit(in_sandbox: Callable[..., Any], latency: str) -> None:
    data = four_workers("1 Gbit/s", latency)
    data["worker"] = data["worker"][:2]
    assert len(in_sandbox(measure, data, 1, False)["links"]) == 2


# User-mode-linux is an ordinary process: its timers come up to 4 ms late, and later on a busy host; hence the dilation.


@pytest.mark.netem_kernel
@pytest.mark.measured
def test_netem_gives_rate_and_delay(in_sandbox: Callable[..., Any]) -> None:
    data = four_workers("500 Mbit/s", "20 ms")
    data["worker"] = data["worker"][:2]
    assert in_sandbox(measure, data, 16, False)["delay_by"] == "netem"


@pytest.mark.netem_kernel
@pytest.mark.measured
def test_netem_gives_jitter_and_loss(in_sandbox: Callable[..., Any]) -> None:
    data = four_workers("50 Mbit/s", "20 ms", jitter="2 ms", loss="2 %")
    data["worker"] = data["worker"][:2]
    for link in in_sandbox(measure, data, 16, False)["links"]:
        assert link["measured_jitter_s"] == pytest.approx(0.002, rel=0.3)
        assert link["measured_loss"] == pytest.approx(0.02, abs=0.01)


@pytest.mark.netem_kernel
@pytest.mark.measured
def test_netem_holds_an_uplink(in_sandbox: Callable[..., Any]) -> None:
    data = four_workers("50 Mbit/s", "5 ms", uplink="60 Mbit/s")
    data["worker"] = data["worker"][:3]
    assert len(in_sandbox(measure, data, 8, False)["uplinks"]) == 3
