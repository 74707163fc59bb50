from __future__ import annotations

import pytest

from bench_profile import BED, compare, is_latency_right, is_rate_right, print_result, shared_lines, summary
from wantrain.topology import Topology


@pytest.fixture
def bed() -> Topology:
    return Topology.load(BED)


def test_a_network_compared_with_itself_is_all_right(bed: Topology, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, lines = compare(bed, bed), shared_lines(bed)
    assert len(pairs) == 56
    narrow = {one["pair"] for one in pairs if one["asked_bytes_per_s"] != one["measured_bytes_per_s"]}
    assert narrow == {"rome-1 → rome-0"}, "the link itself is wider than what the worker's uplink lets through"
    result = summary([one for one in pairs if one["pair"] not in narrow], lines, lines) | {"seconds": 1.0}
    assert result["is_right"]
    print_result(pairs, result)
    assert "1 s in all; all right" in capsys.readouterr().out


def test_shared_lines_are_known_by_who_has_them(bed: Topology) -> None:
    assert shared_lines(bed) == {"uplink, worker rome-1": 15e6, "uplink, site of oslo-0": 13.75e6}


def test_a_line_that_is_missed_or_invented_is_wrong(bed: Topology) -> None:
    pairs = [one for one in compare(bed, bed) if one["pair"] != "rome-1 → rome-0"]
    lines = shared_lines(bed)
    assert not summary(pairs, lines, {})["is_right"]
    assert not summary(pairs, lines, lines | {"downlink, worker lyon-0": 1e6})["is_right"]
    assert not summary(pairs, lines, {name: 1.2 * rate for name, rate in lines.items()})["is_right"]


def test_figures_are_right_within_a_tenth_or_two_milliseconds() -> None:
    assert is_rate_right(100, 109)
    assert not is_rate_right(100, 89)
    assert is_latency_right(1e-3, 2.9e-3)
    assert is_latency_right(0.1, 0.109)
    assert not is_latency_right(0.1, 0.111)
