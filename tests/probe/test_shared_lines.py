"""On networks that are known, measured perfectly, exactly the lines that are there are found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from networks import fair_rates, measure, topology_of, two_sites

from wantrain.probe.shared_lines import SharedLines, corrected_rates, short_sums, unlike_pairs
from wantrain.topology import PAYLOAD_SHARE

MBIT = 1e6 / 8 * PAYLOAD_SHARE


def found_in(data: dict[str, Any]) -> dict[str, float]:
    """Return the limits found, in Mbit/s of the line itself."""
    shared = SharedLines(measure(topology_of(data)))
    kinds = {
        "up": shared.uplinks, "down": shared.downlinks, "site up": shared.site_uplinks,
        "site down": shared.site_downlinks,
    }  # fmt: skip
    return {f"{kind} {name}": rate / MBIT for kind, limits in kinds.items() for name, rate in limits.items()}


def test_a_network_without_shared_lines_has_none() -> None:
    assert found_in(two_sites()) == {}


def test_a_workers_uplink_is_found() -> None:
    data = two_sites()
    data["worker"][0]["uplink"] = "80 Mbit/s"
    assert found_in(data) == {"up a-0": pytest.approx(80), "up a-1": pytest.approx(80)}


def test_a_workers_downlink_is_found_and_is_nobodys_uplink() -> None:
    data = two_sites()
    data["worker"][1]["downlink"] = "60 Mbit/s"
    assert found_in(data) == {"down b-0": pytest.approx(60), "down b-1": pytest.approx(60)}


def test_a_sites_uplink_is_the_sites_and_no_workers() -> None:
    assert found_in(two_sites(uplink="70 Mbit/s")) == {"site up east": pytest.approx(70)}


def three_sites(**site: str) -> dict[str, Any]:
    data = two_sites(**site)
    data["worker"].append({"name": "c", "count": 2, "site": "south"})
    data["link"].append({"within": "south", "bandwidth": "100 Mbit/s", "latency": "1 ms"})
    for other in ("east", "west"):
        data["link"].append({"between": [other, "south"], "bandwidth": "50 Mbit/s", "latency": "20 ms"})
    return data


def test_a_sites_downlink_is_told_from_uplinks_where_there_are_three() -> None:
    assert found_in(three_sites(downlink="130 Mbit/s")) == {"site down east": pytest.approx(130)}


def test_both_ways_of_a_site_are_found() -> None:
    found = found_in(three_sites(uplink="130 Mbit/s", downlink="120 Mbit/s"))
    assert found == {"site up east": pytest.approx(130), "site down east": pytest.approx(120)}


def test_two_workers_share_nothing_that_is_not_their_link() -> None:
    data = two_sites()
    data["worker"] = [{"name": "a", "site": "east", "uplink": "20 Mbit/s"}, {"name": "b", "site": "west"}]
    data["link"] = data["link"][2:]
    assert found_in(data) == {}


def test_links_that_were_slowed_by_company_get_the_rate_of_the_pair_alone() -> None:
    topology = topology_of(two_sites(uplink="70 Mbit/s"))
    made = measure(topology)
    in_company = fair_rates(topology, [("a-0", "b-0"), ("a-1", "b-1")])
    assert in_company["a-1", "b-1"] == pytest.approx(35 * MBIT)
    assert corrected_rates(made)["a-1", "b-1"] == pytest.approx(50 * MBIT)


def test_a_pair_that_was_measured_alone_keeps_its_own_rate() -> None:
    made = measure(topology_of(two_sites()))
    made = dataclasses.replace(made, alone_bytes_per_s={("a-0", "b-1"): 30 * MBIT})
    assert corrected_rates(made)["a-0", "b-1"] == 30 * MBIT


def test_a_pair_unlike_its_fellows_is_looked_at_again() -> None:
    made = measure(topology_of(two_sites()))
    odd = made.several_bytes_per_s | {("a-1", "b-1"): 64 * MBIT}
    made = dataclasses.replace(made, several_bytes_per_s=odd)
    assert unlike_pairs(made) == [("a-1", "b-1")]


def test_what_falls_short_is_named_by_its_field() -> None:
    assert short_sums(measure(topology_of(two_sites(uplink="70 Mbit/s")))) == [("site_sent_bytes_per_s", "east")]
