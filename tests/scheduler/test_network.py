import pytest

from tests.scheduler.cases import regions
from wantrain.errors import TopologyError
from wantrain.scheduler.network import chained_sites, make_network
from wantrain.topology import PAYLOAD_SHARE, Topology


def names(topology: Topology) -> list[str]:
    return [worker.name for worker in topology.workers]


def test_every_link_is_that_of_the_topology() -> None:
    topology = regions({"a": 2, "b": 2, "c": 1})
    network = make_network(topology, names(topology))
    for i, source in enumerate(network.names):
        for j, target in enumerate(network.names):
            if i != j:
                place = network.link(i, j)
                assert 1 / network.s_per_byte[place] == pytest.approx(topology.payload_bytes_per_s(source, target))
                assert network.latency_s[place] == topology.link(source, target).latency_s


def test_workers_of_a_site_share_a_class_unless_a_rule_names_one() -> None:
    data = {
        "name": "t",
        "worker": [{"name": "w", "count": 3, "site": "s"}],
        "link": [
            {"within": "s", "bandwidth": "1 Gbit/s"},
            {"from": "w-2", "to": "s", "bandwidth": "10 Mbit/s"},
        ],
    }
    network = make_network(topology := Topology.parse(data, TopologyError, "t"), names(topology))
    assert network.class_of[0] == network.class_of[1] != network.class_of[2]
    assert network.s_per_byte[network.link(2, 0)] == pytest.approx(8 / 10e6 / PAYLOAD_SHARE)
    assert network.s_per_byte[network.link(0, 2)] == pytest.approx(8 / 1e9 / PAYLOAD_SHARE)


def test_shared_lines_are_kept_beside_the_links() -> None:
    data = {
        "name": "t",
        "worker": [
            {"name": "a", "site": "x", "uplink": "8 Mbit/s"},
            {"name": "b", "site": "y", "downlink": "16 Mbit/s"},
        ],
        "site": [{"name": "x", "uplink": "80 Mbit/s"}],
        "link": [{"between": ["x", "y"], "bandwidth": "1 Gbit/s"}],
    }  # fmt: skip
    network = make_network(Topology.parse(data, TopologyError, "t"), ["a", "b"])
    assert network.up_s_per_byte == pytest.approx((1e-6 / PAYLOAD_SHARE, 0.0))
    assert network.down_s_per_byte == pytest.approx((0.0, 0.5e-6 / PAYLOAD_SHARE))
    assert network.site_up_s_per_byte == pytest.approx((1e-7 / PAYLOAD_SHARE, 0.0))


def test_a_chain_of_sites_goes_on_to_the_nearest() -> None:
    topology = regions({"a": 1, "b": 1, "c": 1}).with_link("a", "c", bandwidth_bytes_per_s=1e9)
    topology = topology.with_link("c", "a", bandwidth_bytes_per_s=1e9)
    network = make_network(topology, names(topology))
    first = [network.sites[site] for site in chained_sites(network, 1e6)[0]]
    assert first in (["a", "c", "b"], ["c", "a", "b"], ["b", "a", "c"], ["b", "c", "a"])


def test_a_thousand_workers_are_turned_into_few_classes() -> None:
    topology = regions({f"s{i}": 34 for i in range(30)})
    network = make_network(topology, names(topology))
    assert network.num_workers == 1020
    assert network.num_classes == 30
    assert len(network.s_per_byte) == 900
