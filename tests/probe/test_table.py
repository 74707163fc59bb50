from __future__ import annotations

import json

import pytest
from networks import measure, topology_of, two_sites

from wantrain.probe.table import as_json, table_lines


def test_every_pair_is_a_line_and_every_shared_line_one_more() -> None:
    head, *lines = table_lines(measure(topology_of(two_sites(uplink="70 Mbit/s"))))
    assert head.split() == ["from", "to", "one", "way", "1", "connection", "8", "connections"]
    assert lines[0].split() == ["a-0", "a-1", "1", "ms", "100", "Mbit/s", "100", "Mbit/s"]
    assert len(lines) == 12 + 1
    assert lines[-1] == "uplink of site east: 70 Mbit/s, shared by all its links"


def test_where_nothing_is_shared_that_is_said() -> None:
    assert list(table_lines(measure(topology_of(two_sites()))))[-1].startswith("no shared line")


def test_figures_are_undilated_in_lines_and_json_alike() -> None:
    made = measure(topology_of(two_sites(uplink="70 Mbit/s")).dilated(4))
    assert "20 ms" in "\n".join(table_lines(made, 4))
    values = as_json(made, 4)
    assert json.loads(json.dumps(values)) == values
    link = next(one for one in values["links"] if (one["source"], one["target"]) == ("a-0", "b-0"))
    assert link["bandwidth_bytes_per_s"] == pytest.approx(50e6 / 8)
    assert link["latency_s"] == pytest.approx(0.02)
    assert values["site_uplinks"] == {"east": pytest.approx(70e6 / 8)}
