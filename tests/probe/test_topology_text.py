from __future__ import annotations

import dataclasses
import tomllib

import pytest
from networks import measure, topology_of, two_sites

from wantrain.errors import TopologyError
from wantrain.probe.measurement import Measurement
from wantrain.probe.topology_text import flops_text, topology_text
from wantrain.topology import Topology


def written(made: Measurement, dilation: float = 1.0) -> Topology:
    return Topology.parse(tomllib.loads(topology_text(made, "t", "a test", dilation)), TopologyError, "t")


@pytest.mark.parametrize("site", [{}, {"uplink": "70 Mbit/s"}])
def test_a_known_network_is_written_as_it_is(site: dict[str, str]) -> None:
    asked = topology_of(two_sites(**site))
    found = written(measure(asked))
    for a, b, link in asked.pairs():
        own = found.link(a.name, b.name)
        assert own.bandwidth_bytes_per_s == pytest.approx(link.bandwidth_bytes_per_s, rel=1e-3)
        assert own.latency_s == pytest.approx(link.latency_s, rel=1e-3)
    assert [one.uplink_bytes_per_s for one in found.sites] == pytest.approx(
        [one.uplink_bytes_per_s for one in asked.sites], rel=1e-3
    )


def test_links_that_agree_are_one_rule() -> None:
    assert len(written(measure(topology_of(two_sites()))).rules) == 3


def test_directions_that_differ_are_two_rules_and_an_odd_pair_its_own() -> None:
    data = two_sites()
    data["link"][2:] = [
        {"from": "east", "to": "west", "bandwidth": "50 Mbit/s", "latency": "20 ms"},
        {"from": "west", "to": "east", "bandwidth": "20 Mbit/s", "latency": "20 ms"},
        {"from": "b-0", "to": "a-1", "bandwidth": "10 Mbit/s", "latency": "20 ms"},
    ]
    found = written(measure(topology_of(data)))
    assert [rule.ends for rule in found.rules[1:4]] == [[("east", "west")], [("west", "east")], [("b-0", "a-1")]]
    assert found.link("b-0", "a-1").bandwidth_bytes_per_s == pytest.approx(10e6 / 8, rel=1e-3)


def test_a_dilated_network_is_written_undilated() -> None:
    asked = topology_of(two_sites(uplink="70 Mbit/s"))
    found = written(measure(asked.dilated(4)), 4)
    assert found.link("a-0", "b-0").bandwidth_bytes_per_s == pytest.approx(50e6 / 8, rel=1e-3)
    assert found.link("a-0", "b-0").latency_s == pytest.approx(0.02)
    assert found.sites[0].uplink_bytes_per_s == pytest.approx(70e6 / 8, rel=1e-3)


def test_what_is_known_of_a_worker_is_written() -> None:
    made = measure(topology_of(two_sites()))
    known = dataclasses.replace(
        made.workers[0], flops_per_s=39e12, codec_values_per_s=4.5e8, device="cuda:1", address="10.1.2.3"
    )
    (worker, other, *_) = written(dataclasses.replace(made, workers=(known, *made.workers[1:]))).workers
    assert (worker.flops_per_s, worker.codec_values_per_s, worker.memory_bytes) == (39e12, 4.5e8, 10**9)
    assert (worker.device, worker.address, worker.site) == ("cuda:1", "10.1.2.3", "east")
    assert (other.codec_values_per_s, other.address) == (None, None)


def test_a_link_that_one_connection_cannot_fill_says_so() -> None:
    made = measure(topology_of(two_sites()))
    quarter = {pair: rate / 4 for pair, rate in made.several_bytes_per_s.items()}
    slow = dataclasses.replace(made, single_bytes_per_s=quarter)
    assert 'bandwidth = "50 Mbit/s"  # one connection reaches 12.5 Mbit/s' in topology_text(slow, "t", "a test")


def test_what_is_no_topology_is_refused() -> None:
    made = measure(topology_of(two_sites()))
    none = dict.fromkeys(made.latency_s, 0.0)
    silent = dataclasses.replace(made, single_bytes_per_s=none, several_bytes_per_s=none, alone_bytes_per_s={})
    with pytest.raises(TopologyError, match=r"what was measured: .*rate must be above zero"):
        topology_text(silent, "t", "a test")


@pytest.mark.parametrize(("speed", "text"), [(39e12, "39 TFLOP/s"), (32.742e9, "32.742 GFLOP/s")])
def test_speeds_are_written_with_a_unit(speed: float, text: str) -> None:
    assert flops_text(speed) == text
