"""Shipped files are found by name, others by path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from wantrain.errors import TopologyError
from wantrain.resources import find_config, program, shipped
from wantrain.topology import Topology


def test_a_path_wins_and_a_name_finds_what_is_shipped(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("")
    assert find_config("topologies", str(path), TopologyError) == path
    assert find_config("topologies", "two_sites", TopologyError).name == "two_sites.toml"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("worldwid", r"no 'worldwid' among the topologies \(did you mean 'worldwide'\?\)"),
        ("nowhere/own.toml", "can't find nowhere/own.toml; give the path of a TOML file, or one of aqsgd_500m, "),
    ],
)
def test_what_is_neither_names_the_choices(given: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        find_config("topologies", given, TopologyError)


@pytest.mark.parametrize("name", shipped("topologies"))
def test_every_shipped_topology_loads_and_names_its_source(name: str) -> None:
    topology = Topology.load(find_config("topologies", name, TopologyError))
    assert topology.source
    assert all(link.latency_s > 0 or name == "dtfm_data_center" for _, _, link in topology.pairs())


def test_ping_times_are_halved_to_one_way() -> None:
    worldwide = Topology.load(find_config("topologies", "worldwide", TopologyError))
    assert worldwide.link("oregon", "virginia").latency_s == pytest.approx(0.0335)


def test_the_program_is_named_as_the_user_can_call_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "bin" / "wantrain"
    own.parent.mkdir()
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", str(own.parent))
    assert program() == "wantrain"
    monkeypatch.setenv("PATH", "")
    assert program() == str(own)
    monkeypatch.chdir(tmp_path)
    assert program() == "bin/wantrain"
