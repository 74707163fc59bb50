from pathlib import Path
from typing import Any

import pytest

from wantrain.errors import TopologyError
from wantrain.resources import configs_folder, shipped
from wantrain.topology import Topology

TWO_SITES: dict[str, Any] = {
    "name": "two",
    "worker": [{"name": "a", "count": 2, "site": "p", "uplink": "200 Mbit/s"}, {"name": "b", "site": "q"}],
    "site": [{"name": "p", "uplink": "150 Mbit/s"}],
    "link": [
        {"within": "p", "bandwidth": "1 Gbit/s", "latency": "1 ms"},
        {"from": "p", "to": "q", "bandwidth": "100 Mbit/s", "latency": "20 ms"},
        {"from": "q", "to": "p", "bandwidth": "300 Mbit/s", "latency": "30 ms"},
    ],
}


def parse(**changes: Any) -> Topology:
    return Topology.parse(TWO_SITES | changes, TopologyError, "two.toml")


def test_a_count_writes_workers_out() -> None:
    assert [worker.name for worker in parse().workers] == ["a-0", "a-1", "b"]


def test_links_are_directed() -> None:
    topology = parse()
    assert topology.link("a-0", "b").latency_s == 0.02
    assert topology.link("b", "a-0").latency_s == 0.03


def test_a_link_between_workers_overrides_one_between_sites() -> None:
    special = {"from": "a-1", "to": "b", "bandwidth": "50 Mbit/s"}
    topology = parse(link=[special, *TWO_SITES["link"]])
    assert topology.link("a-1", "b").bandwidth_bytes_per_s == 6.25e6
    assert topology.link("a-0", "b").bandwidth_bytes_per_s == 12.5e6


def test_the_send_limit_is_the_least_on_the_way_and_a_site_limit_counts_outside_only() -> None:
    topology = parse(link=[{"within": "p", "bandwidth": "1 Gbit/s"}, {"between": ["p", "q"], "bandwidth": "1 Gbit/s"}])
    assert topology.send_limit_bytes_per_s("a-0", "a-1") == 25e6
    assert topology.send_limit_bytes_per_s("a-0", "b") == 18.75e6


def test_dilation_divides_rates_and_multiplies_times() -> None:
    slow = parse().dilated(4)
    assert slow.link("a-0", "b").bandwidth_bytes_per_s == 12.5e6 / 4
    assert slow.link("a-0", "b").latency_s == 0.08
    assert slow.worker("a-0").uplink_bytes_per_s == 25e6 / 4
    assert slow.sites[0].uplink_bytes_per_s == 18.75e6 / 4
    assert slow.worker("b").uplink_bytes_per_s is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"link": TWO_SITES["link"][:2]}, "no link from 'b' to 'a-0'"),
        ({"link": []}, "no link from 'a-0' to 'a-1' and 5 more pairs"),
        ({"worker": [{"name": "a"}, {"name": "a"}]}, "two workers are called 'a'"),
        ({"site": [{"name": "z"}]}, "site 'z' has no worker"),
        ({"link": [{"within": "z", "bandwidth": "1 Gbit/s"}]}, "'z', which is neither a worker nor a site"),
        (
            {"link": [{"within": "p", "bandwith": "1 Gbit/s"}]},  # codespell:ignore bandwith
            r"unknown key 'link.0.bandwith' \(did you mean 'bandwidth'",  # codespell:ignore bandwith
        ),
        ({"worker": [{"name": "a", "memry": "1 GB"}]}, "did you mean 'memory'"),
        ({"link": [{"within": "p", "between": ["p", "q"], "bandwidth": "1 Gbit/s"}]}, "exactly one of"),
        ({"worker": [{"name": "a", "count": 0}]}, "count must be a whole number above zero"),
        ({"worker": [{"name": "../a"}]}, "worker.0.name"),
        ({"link": [{"within": "p", "bandwidth": "-1 Gbit/s"}]}, "must not be negative"),
        ({"link": [{"within": "p", "bandwidth": 1000}]}, "needs a unit"),
    ],
)
def test_a_bad_topology_is_one_line_with_the_file_and_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TopologyError, match=reason) as caught:
        parse(**changes)
    assert str(caught.value).startswith("two.toml: ")
    assert "\n" not in str(caught.value)


def test_unknown_workers_and_pairs_are_named() -> None:
    with pytest.raises(TopologyError, match="has no worker 'c'"):
        parse().link("a-0", "c")
    with pytest.raises(TopologyError, match="no link from 'b' to 'b'"):
        parse().link("b", "b")


def test_files_that_are_missing_or_not_toml_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="can't read"):
        Topology.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(TopologyError, match="is not TOML"):
        Topology.load(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", shipped("topologies"))
def test_shipped_topologies_load_and_name_a_source(name: str) -> None:
    topology = Topology.load(configs_folder() / "topologies" / f"{name}.toml")
    assert len(list(topology.pairs())) == len(topology.workers) * (len(topology.workers) - 1)
    assert topology.source


def test_a_thousand_workers_are_complete_at_once() -> None:
    many = parse(
        worker=[{"name": "w", "count": 1024, "site": "p"}], site=[], link=[{"within": "p", "bandwidth": "1 Gbit/s"}]
    )
    assert many.link("w-0", "w-1023").bandwidth_bytes_per_s == 125e6
