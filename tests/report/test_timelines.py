from __future__ import annotations

from itertools import pairwise

import pytest

from wantrain.report.style import house_style, to_svg
from wantrain.report.timelines import MAX_RANKS, draw_timelines, look_of, make_lanes, merged
from wantrain.timeline import Event, Timeline


def two_ranks(source: str = "measured", peer: str = "b") -> Timeline:
    events = (
        Event(0, "forward", 1.0, 1.5, 0),
        Event(0, "send", 1.5, 1.6, 0, peer, 100),
        Event(1, "wait", 1.0, 2.0, 0, "a"),
        Event(1, "forward", 2.0, 2.5, 0),
    )
    return Timeline(source, ("a", "b"), events, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event", "look"),
    [
        (Event(0, "send", 0, 1, 3, "b"), "tensor"),
        (Event(0, "send", 0, 1, -1, "b"), "gradient"),
        (Event(0, "wait", 0, 1, 3, "b"), "wait"),
        (Event(0, "wait", 0, 1), "reduce"),
        (Event(0, "decode", 0, 1, 3), "encode"),
        (Event(0, "backward", 0, 1, 3), "backward"),
    ],
)
def test_the_look_follows_from_what_the_event_is_about(event, look):
    assert look_of(event) == look


def test_chunks_of_one_tensor_are_one_bar():
    chunks = [Event(0, "send", i * 0.1, i * 0.1 + 0.09, 2, "b") for i in range(5)]
    (bar,) = merged(chunks, gap_s=0.02)
    assert (bar.start_s, bar.end_s) == (0.0, pytest.approx(0.49))
    assert len(merged(chunks, gap_s=0.005)) == 5


def test_different_microbatches_stay_apart():
    events = [Event(0, "forward", 0.0, 1.0, 0), Event(0, "forward", 1.0, 2.0, 1)]
    assert merged(events, gap_s=0.01) == events
    assert len(merged(events, gap_s=1.0)) == 1  # at a scale at which neither can be seen


def test_every_link_of_either_timeline_has_one_lane_below_its_rank():
    lanes = make_lanes([two_ranks(peer="b"), two_ranks(peer="c")])
    assert [(lane.rank, lane.peer) for lane in lanes] == [(0, None), (0, "b"), (0, "c"), (1, None)]
    assert all(one.top + one.height <= other.top for one, other in pairwise(lanes))


def test_more_ranks_than_fit_leave_the_first():
    names = tuple(f"w{i}" for i in range(MAX_RANKS + 5))
    assert len(make_lanes([Timeline("predicted", names, ())])) == MAX_RANKS


def test_prediction_and_measurement_share_one_time_axis():
    longer = two_ranks("predicted")._replace(events=(Event(0, "forward", 0.0, 4.0, 0),))
    upper, lower = draw_timelines([longer, two_ranks()]).axes
    assert upper.get_xlim() == lower.get_xlim() == (0, 4.0)
    assert upper.get_title(loc="left") == "predicted: 4 s"
    assert lower.get_title(loc="left") == "measured, step 8: 1.5 s"


def test_a_wait_says_for_whom_and_a_forward_which_microbatch():
    with house_style():
        svg = to_svg(draw_timelines([two_ranks()]), "a step")
    assert ">a</text>" in svg
    assert ">0</text>" in svg
    assert "→ b</text>" in svg


def test_thousands_of_sends_stay_small():
    sends = [Event(0, "send", i * 0.01, i * 0.01 + 0.004, i % 3, "b", 10) for i in range(20_000)]
    with house_style():
        svg = to_svg(draw_timelines([Timeline("measured", ("a", "b"), tuple(sends))]), "a step")
    assert len(svg) < 50_000


def test_nothing_hangs_over_the_edge_with_every_kind_in_the_legend():
    kinds = ("forward", "backward", "reduce", "step", "wait", "send", "encode", "decode")
    events = [Event(0, kind, i, i + 1, i % 2 - 1, "b") for i, kind in enumerate(kinds * 2)]
    with house_style():
        figure = draw_timelines([Timeline("measured", ("a-worker-of-a-very-long-name", "b"), tuple(events))])
        box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()
