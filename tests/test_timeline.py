from pathlib import Path

import pytest

from wantrain.errors import ConfigError
from wantrain.timeline import Event, Timeline, merge

EVENTS = [
    Event(1, "forward", 0.5, 0.75, 0),
    Event(0, "forward", 0.0, 0.25, 0),
    Event(0, "send", 0.25, 0.5, 0, "b", 100),
    Event(0, "send", 0.5, 0.625, 1, "b", 50),
    Event(0, "wait", 0.5, 1.0, 0, "b"),
]


def test_events_of_all_ranks_are_joined_in_order_of_their_start() -> None:
    timeline = merge("measured", ["a", "b"], 7, EVENTS)
    assert [event.start_s for event in timeline.events] == [0.0, 0.25, 0.5, 0.5, 0.5]
    assert timeline.span_s == 1.0
    assert timeline.compute_by_rank() == [0.25, 0.25]
    assert timeline.bytes_by_link() == {("a", "b"): 150}


def test_a_timeline_survives_its_file(tmp_path: Path) -> None:
    timeline = merge("predicted", ["a", "b"], 7, EVENTS)
    timeline.save(tmp_path / "t.json")
    assert Timeline.load(tmp_path / "t.json") == timeline


def test_another_version_is_refused() -> None:
    data = merge("predicted", ["a"], 0, []).to_dict()
    assert Timeline.from_dict(data, "t").span_s == 0.0
    with pytest.raises(ConfigError, match="not a timeline of version 1"):
        Timeline.from_dict(data | {"version": 2}, "t")
