"""The pure part: which commands a topology becomes."""

from __future__ import annotations

import re

import pytest

from wantrain.errors import EmulationError, TopologyError
from wantrain.netem.commands import HUB, NetworkCommands, address, network_commands
from wantrain.topology import Topology


def pair(link: dict[str, str], **worker: str) -> Topology:
    workers = [{"name": "a", "site": "x"} | worker, {"name": "b", "site": "y"}]
    rule = {"between": ["a", "b"], "bandwidth": "100 Mbit/s", "latency": "20 ms"} | link
    return Topology.parse({"name": "pair", "worker": workers, "link": [rule]}, TopologyError, "test")


def lines(built: NetworkCommands, pattern: str) -> list[str]:
    return [str(command) for command in built.commands if re.search(pattern, str(command))]


def test_every_ordered_pair_has_a_class_at_its_own_rate() -> None:
    links = [
        {"from": "a", "to": "b", "bandwidth": "10 Mbit/s"},
        {"from": "b", "to": "a", "bandwidth": "30 Mbit/s"},
    ]
    topology = Topology.parse(
        {"name": "t", "worker": [{"name": "a"}, {"name": "b"}], "link": links}, TopologyError, "t"
    )
    built = network_commands(topology, has_netem=False)
    assert len(lines(built, "class add")) == 2
    assert len(lines(built, "-n a class add dev e0 parent 1: .* rate 10000000bit ceil 10000000bit")) == 1
    assert len(lines(built, "-n b class add dev e0 parent 1: .* rate 30000000bit ceil 30000000bit")) == 1


def test_children_of_an_uplink_are_guaranteed_next_to_nothing() -> None:
    built = network_commands(pair({}, uplink="40 Mbit/s"), has_netem=False)
    assert len(lines(built, "-n a class add .* classid 1:1 htb rate 40000000bit ceil 40000000bit")) == 1
    (child,) = lines(built, "-n a class add .* parent 1:1 ")
    assert "rate 8kbit ceil 40000000bit" in child


def test_a_downlink_is_shaped_at_the_hub() -> None:
    built = network_commands(pair({}, downlink="40 Mbit/s"), has_netem=False)
    (shape,) = lines(built, f"tc -n {HUB} class add")
    assert "dev p0" in shape
    assert "ceil 40000000bit" in shape


def test_a_limited_site_has_a_bridge_joined_by_a_pair_shaped_on_both_ends() -> None:
    topology = pair({})
    site = {"name": "x", "uplink": "20 Mbit/s", "downlink": "50 Mbit/s"}
    data = {
        "name": "t",
        "worker": [{"name": "a", "site": "x"}, {"name": "b", "site": "y"}],
        "site": [site],
        "link": [{"between": ["a", "b"], "bandwidth": "1 Gbit/s"}],
    }
    built = network_commands(Topology.parse(data, TopologyError, "t"), has_netem=False)
    assert lines(built, "link add name s0 type bridge")
    assert lines(built, "dev p0 master s0")
    assert lines(built, "dev p1 master hub")
    assert lines(built, "class add dev u0 .* ceil 20000000bit")
    assert lines(built, "class add dev d0 .* ceil 50000000bit")
    assert not lines(network_commands(topology, has_netem=False), "s0")


def test_delay_is_queued_at_the_receiver_one_queue_for_each_source() -> None:
    built = network_commands(pair({}), has_netem=False, iptables="iptables")
    assert [str(queue) for queue in built.delay_lines["b"]] == ["0:0.020000000"]
    (rule,) = lines(built, "netns exec b iptables")
    assert rule.endswith("-i e0 -s 10.77.0.1 -j NFQUEUE --queue-num 0")


def test_no_latency_needs_no_delay_line() -> None:
    assert network_commands(pair({"latency": "0 s"}), has_netem=False).delay_lines == {}


def test_with_netem_delay_jitter_and_loss_are_a_leaf_of_the_class() -> None:
    built = network_commands(pair({"jitter": "2 ms", "loss": "0.5 %"}), has_netem=True)
    assert built.delay_lines == {}
    for leaf in lines(built, "netem"):
        assert leaf.endswith("delay 20000us 2000us distribution normal loss 0.5%")
    assert len(lines(built, "netem")) == 2
    assert len(lines(built, "gso_max_segs 1")) == 2


@pytest.mark.parametrize(("link", "word"), [({"jitter": "2 ms"}, "jitter"), ({"loss": "1 %"}, "loss")])
def test_jitter_and_loss_are_refused_without_netem(link: dict[str, str], word: str) -> None:
    with pytest.raises(EmulationError, match=rf"from 'a' to 'b' asks for {word}.*sch_netem.*install"):
        network_commands(pair(link), has_netem=False)


def test_the_limit_of_netem_holds_the_bandwidth_delay_product() -> None:
    (leaf, _) = lines(network_commands(pair({"bandwidth": "1 Gbit/s", "latency": "50 ms"}), has_netem=True), "netem")
    limit = int(leaf.split("limit ")[1].split()[0])
    assert limit * 1514 >= 125e6 * 0.05


def test_queues_and_buffers_grow_with_the_bandwidth_delay_product() -> None:
    built = network_commands(pair({"bandwidth": "1 Gbit/s", "latency": "100 ms"}), has_netem=False)
    (leaf, _) = lines(built, "bfifo")
    assert int(leaf.split("limit ")[1]) == 25_000_000
    assert all("4096 131072 100000000 >tcp_rmem" in line for line in lines(built, "tcp_rmem"))


def test_dilation_divides_rates_multiplies_times_and_the_retransmission_time_out() -> None:
    built = network_commands(pair({}), has_netem=False, dilation=4)
    assert len(lines(built, "ceil 25000000bit")) == 2
    assert built.delay_lines["a"][0].delay_s == pytest.approx(0.08)
    assert len(lines(built, "rto_min 800ms")) == 2
    assert not lines(network_commands(pair({}), has_netem=False), "rto_min")


def test_a_piece_that_tcp_hands_down_is_a_millisecond_of_the_line_at_any_dilation() -> None:
    for dilation in (1, 4, 40):
        built = network_commands(pair({}), has_netem=False, dilation=dilation)
        assert len(lines(built, "gso_max_size 12500$")) == 2


def test_addresses_are_distinct_beyond_one_byte() -> None:
    assert len({address(i) for i in range(1000)}) == 1000
    assert [address(i) for i in (0, 254, 255)] == ["10.77.0.1", "10.77.0.255", "10.77.1.0"]
