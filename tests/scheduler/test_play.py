"""The event loop, uncompiled and compiled, on steps that can be added up by hand."""

from __future__ import annotations

import numpy as np
import pytest
from plays import flat, make_plan, work

from wantrain.scheduler.disturbance import CALM, Disturbance
from wantrain.scheduler.layout import lay_out
from wantrain.scheduler.native import compiled
from wantrain.scheduler.play import HELPERS, play
from wantrain.scheduler.simulator import simulate, step_s
from wantrain.topology import Topology


def jittery() -> Topology:
    return flat(6, "2 MB/s", latency="100 ms", jitter="80 ms")


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("is_blocking", [False, True])
def test_machine_code_plays_to_the_same_bits(is_blocking: bool, schedule: str) -> None:
    plan = make_plan(3, 2, 6, [5, 4, 2], schedule, [0, 1, 3] if schedule == "zero_bubble" else None)
    coding = dict.fromkeys(("forward_encode_s", "forward_decode_s", "backward_encode_s"), (0.05,) * 6)
    gradients = {"bucket_bytes": ((400_000,) * 3,) * 3, "bucket_coding_s": (0.01,) * 3, "weights_s": (0.9,) * 6}
    workload = work(plan, **gradients, **coding)
    disturbance = Disturbance(slow={"w1": 1.5}, jitter_seed=3, has_blocking_sends=is_blocking)
    script = lay_out(plan, jittery(), workload, disturbance, is_recorded=True)
    plain = script.as_lists()
    play(plain.ints, plain.floats)
    compiled(play, *HELPERS)(script.ints, script.floats)
    assert plain.ints == script.ints.tolist()
    assert np.array(plain.floats).tobytes() == script.floats.tobytes()


def test_gradients_of_weights_fill_the_time_in_which_a_stage_would_wait() -> None:
    free, split = {"forward_bytes": (0, 0, 0), "backward_bytes": (0, 0, 0)}, {"weights_s": (1.0,) * 3}
    whole = make_plan(3, 1, 4, [3, 2, 1])
    lean = make_plan(3, 1, 4, [3, 2, 1], "zero_bubble")
    wide = make_plan(3, 1, 4, [4, 3, 1], "zero_bubble", [4, 4, 4])
    spans = [simulate(plan, flat(3), work(plan, **free, **split)).span_s for plan in (whole, lean, wide)]
    assert spans[0] == pytest.approx(3 * (4 + 2))  # what is not split isn't put off
    assert spans[1] == pytest.approx(3 * 4 + 2 * 2)
    assert spans[2] == pytest.approx(3 * 4 + 2)  # the last stage never waits from its first forward on
    kinds = [event.kind for event in simulate(lean, flat(3), work(lean, **free, **split)).of_rank(2)]
    assert kinds.count("weights") == kinds.count("backward") == 4


def test_gradients_that_come_last_are_those_that_are_summed_last() -> None:
    plan = make_plan(1, 2, 2, [1], "zero_bubble", [2])
    workload = work(plan, weights_s=(1.0, 1.0), bucket_bytes=((100_000, 100_000),))
    timeline = simulate(plan, flat(2), workload)
    sent_s = min(event.start_s for event in timeline.events if event.kind == "send")
    last_s = max(event.start_s for event in timeline.of_rank(0) if event.kind == "weights")
    assert sent_s == pytest.approx(last_s + 0.5)


def test_coding_delays_a_payload_and_holds_up_no_computing() -> None:
    plan = make_plan(2, 1, 4, [4, 4])
    coded = work(plan, forward_encode_s=(0.5, 0.0), forward_decode_s=(0.0, 0.25))
    plain, slower = simulate(plan, flat(2), work(plan)), simulate(plan, flat(2), coded)
    assert slower.span_s == pytest.approx(plain.span_s + 0.75)
    assert [e.start_s for e in slower.of_rank(0) if e.kind == "forward"] == [0, 1, 2, 3]
    assert [(e.kind, e.start_s) for e in slower.events if e.kind in ("encode", "decode")][:3] == [
        ("encode", 1.0),
        ("encode", 2.0),
        ("decode", 2.5),
    ]


def test_one_thread_encodes_one_payload_after_another() -> None:
    plan = make_plan(2, 1, 4, [4, 4])
    timeline = simulate(plan, flat(2), work(plan, forward_encode_s=(3.0, 0.0)))
    assert [e.end_s for e in timeline.events if e.kind == "encode"] == [4, 7, 10, 13]


def test_a_buckets_coding_is_hidden_behind_the_wire_of_the_others() -> None:
    plan = make_plan(1, 2, 1)
    one, two = ((2_000_000,),), ((2_000_000,) * 2,)
    late = Disturbance(overlaps_gradients=False)
    alone = step_s(plan, flat(2), work(plan, bucket_bytes=one, bucket_coding_s=(0.4,)), late)
    assert alone == pytest.approx(3 + 0.2 + 1 + 0.4 + 1 + 0.2)
    both = step_s(plan, flat(2), work(plan, bucket_bytes=two, bucket_coding_s=(0.4,)), late)
    assert both == pytest.approx(3 + 0.2 + 2 * 2 + 0.2)


def test_buckets_leave_while_the_last_backward_goes_on_or_after_it() -> None:
    plan = make_plan(1, 2, 1)
    workload = work(plan, bucket_bytes=((1_000_000,) * 2,))
    assert step_s(plan, flat(2), workload, CALM) == pytest.approx(2 + 2)  # half of the backward is done
    assert step_s(plan, flat(2), workload, Disturbance(overlaps_gradients=False)) == pytest.approx(3 + 2)


def test_a_blocking_send_holds_up_the_sender_until_it_has_left() -> None:
    plan = make_plan(2, 1, 4, schedule="gpipe")
    blocked = simulate(plan, flat(2, latency="10 s"), work(plan), Disturbance(has_blocking_sends=True))
    assert [e.start_s for e in blocked.of_rank(0) if e.kind == "forward"] == [0, 2, 4, 6]
    free = simulate(plan, flat(2, latency="10 s"), work(plan))
    assert [e.start_s for e in free.of_rank(0) if e.kind == "forward"] == [0, 1, 2, 3]
    assert blocked.span_s > free.span_s
