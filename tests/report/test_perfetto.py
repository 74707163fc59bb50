import itertools
import json
from pathlib import Path

import pytest

from tests.watched import Watched
from wantrain.cli import main
from wantrain.errors import ConfigError
from wantrain.plan import Plan
from wantrain.report.perfetto import in_a_row, save_trace, trace_of
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


def test_a_counter_for_each_link_carries_the_bytes_that_were_sent() -> None:
    events = [event for event in trace_of(TIMELINE)["traceEvents"] if event["ph"] == "C"]
    assert {(one["pid"], one["name"]) for one in events} == {(0, "to b, Mbit/s")}
    points = [(one["ts"], one["args"]["Mbit/s"]) for one in events]
    spans = itertools.pairwise(points)
    sent_bytes = sum(rate * 1e6 / 8 * (end - start) / 1e6 for (start, rate), (end, _) in spans)
    assert sent_bytes == pytest.approx(100, rel=1e-3)  # rates are rounded
    assert points[-1][1] == 0.0
    (start,) = [ts for ts, rate in points if rate]
    assert start == pytest.approx(1e6)


def test_steps_in_a_row_begin_where_the_one_before_ends() -> None:
    later = Timeline("measured", TIMELINE.workers, TIMELINE.events, 8)
    row = in_a_row([later, later])
    assert row.span_s == 2 * TIMELINE.span_s
    assert [event.start_s for event in row.events if event.kind == "send"] == [1.0, 5.0]


def test_a_real_runs_recorded_steps_are_written_by_one_command(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, workers = tmp_path / "trace.json", Plan.load(watched.run.plan).workers
    assert main(["report", str(watched.run.path), "--trace", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    trace = json.loads(path.read_text())
    recorded = watched.run.read_timelines(workers)
    slices = [one for one in trace["traceEvents"] if one["ph"] == "X"]
    assert len(slices) == sum(len(timeline.events) for timeline in recorded) > 0
    assert {one["name"] for one in trace["traceEvents"] if one["ph"] == "C"} == {f"to {one}, Mbit/s" for one in workers}
    assert main(["report", str(watched.run.path), "--trace", str(path), "--step", "5"]) == 0
    one_step = [one for one in json.loads(path.read_text())["traceEvents"] if one["ph"] == "X"]
    assert len(one_step) == len(recorded[1].events)
    assert main(["report", str(watched.run.path), "--trace", str(path), "--step", "7"]) == 2
    assert "step 7 of" in capsys.readouterr().err
    assert main(["report", str(watched.run.path), "--step", "5"]) == 2
