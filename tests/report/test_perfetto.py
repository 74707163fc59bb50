import json
from pathlib import Path

import pytest

from wantrain.errors import ConfigError
from wantrain.report.perfetto import save_trace, trace_of
from wantrain.timeline import Event, Timeline

TIMELINE = Timeline(
    "predicted",
    ("a", "b"),
    (
        Event(0, "forward", 0.0, 1.0, 0),
        Event(0, "forward", 1.0, 2.0, 1),
        Event(0, "send", 1.0, 1.5, 0, "b", 100),
        Event(0, "encode", 1.0, 3.0, 0),
        Event(0, "encode", 2.0, 4.0, -1),
        Event(1, "wait", 0.0, 1.5, 0),
        Event(1, "wait", 2.0, 2.5),
    ),
    3,
)


def test_every_event_is_a_slice_in_microseconds_on_its_workers_track() -> None:
    events = trace_of(TIMELINE)["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(TIMELINE.events)
    send = next(one for one in slices if one["name"] == "send 0")
    assert (send["pid"], send["ts"], send["dur"], send["args"]["bytes"]) == (0, 1e6, 0.5e6, 100)
    names = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert names[send["pid"], send["tid"]] == "to b"
    assert [one["args"]["name"] for one in events if one["name"] == "process_name"] == ["a", "b"]
    assert {one["name"] for one in slices} >= {"forward 0", "wait gradients", "encode gradients"}


def test_nothing_overlaps_on_a_track() -> None:
    slices = [event for event in trace_of(TIMELINE)["traceEvents"] if event["ph"] == "X"]
    for one in slices:
        for other in slices:
            if one is not other and (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
                assert one["ts"] + one["dur"] <= other["ts"] or other["ts"] + other["dur"] <= one["ts"]


def test_a_trace_is_json_and_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    save_trace(TIMELINE, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"source": "predicted", "step": 3}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't write"):
        save_trace(TIMELINE, tmp_path / "file" / "trace.json")
