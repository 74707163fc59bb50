"""The hosts file: who is where, and what must not go over a public network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wantrain.errors import ConfigError
from wantrain.launch.hosts import Hosts, PortRange
from wantrain.topology import Topology

ROOT = Path(__file__).resolve().parents[2]


def hosts(*places: dict[str, Any], **more: Any) -> Hosts:
    given = [{"workers": [f"w-{i}"], "ssh": f"h{i}"} | place for i, place in enumerate(places)]
    return Hosts.parse({"host": given} | more, ConfigError, "hosts.toml")


def test_the_shipped_example_is_whole() -> None:
    found = Hosts.load(ROOT / "configs" / "hosts" / "two_labs.toml")
    assert [host.address for host in found.hosts] == ["10.77.0.1", "10.77.0.2"]
    assert found.host_of("a-1").ssh == found.host_of("a-0").ssh
    topology = Topology.load(ROOT / "configs" / "topologies" / "two_sites.toml")
    found.require([worker.name for worker in topology.workers], insecure=False)


def test_a_public_address_is_refused_unless_insecure() -> None:
    found = hosts({"address": "10.0.0.1"}, {"address": "9.9.9.9"})
    with pytest.raises(ConfigError, match=r"host 'w-1' is reached at 9.9.9.9, a public address, .* or say --insecure"):
        found.require(["w-0", "w-1"], insecure=False)
    found.require(["w-0", "w-1"], insecure=True)
    found.require(["w-0"], insecure=False)  # a host that has no part in the plan may be anywhere


@pytest.mark.parametrize("address", ["10.1.2.3", "192.168.7.7", "172.20.0.1", "100.64.3.4", "fd00::1", "127.0.0.1"])
def test_private_addresses_are_taken(address: str) -> None:
    hosts({"address": address}).require(["w-0"], insecure=False)


def test_a_worker_of_the_plan_without_a_host_is_named() -> None:
    with pytest.raises(ConfigError, match="no host has worker 'w-7' of the plan"):
        hosts({"address": "10.0.0.1"}).require(["w-7"], insecure=False)


def test_tunnels_get_addresses_in_the_files_order() -> None:
    found = hosts({"endpoint": "a"}, {"address": "10.77.0.9"}, {"endpoint": "c"}, wireguard={"network": "10.77.0.0/24"})
    assert [host.address for host in found.hosts] == ["10.77.0.1", "10.77.0.9", "10.77.0.3"]


@pytest.mark.parametrize(
    ("places", "more", "said"),
    [
        ([{}], {}, "host 'w-0' has no address"),
        ([{"address": "10.0.0.1", "endpoint": "a"}], {}, "has an endpoint but the file no"),
        ([{"ssh": "-oProxyCommand=x"}], {}, "host.0.ssh"),
        ([{"addr": "10.0.0.1"}], {}, "did you mean 'address'"),
        ([{"address": "10.0.0.1"}], {"ports": "5-4"}, "expected a range of ports"),
        ([{"endpoint": "a"}], {"wireguard": {"network": "8.8.8.0/24"}}, "must be of private addresses"),
        ([{}, {}], {"wireguard": {"network": "10.77.0.0/24"}}, "two hosts without an endpoint"),
        ([{"endpoint": "a"}] * 3, {"wireguard": {"network": "10.77.0.0/30"}}, "has no room for 3 hosts"),
        ([{"endpoint": "a", "address": "10.0.0.1"}], {"wireguard": {"network": "10.77.0.0/24"}}, "outside wireguard"),
        ([{"workers": ["x"], "address": "10.0.0.1"}] * 2, {}, "worker 'x' runs on two hosts"),
    ],
)
def test_mistakes_are_one_line(places: list[dict[str, Any]], more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        hosts(*places, **more)
    assert "\n" not in str(caught.value)


def test_a_range_of_ports_holds_another() -> None:
    assert PortRange.of("40000-40999").holds(PortRange.of("40100-40200"))
    assert not PortRange.of("40000-40999").holds(PortRange.of("40900-41000"))
