from plays import flat, make_plan, work

from wantrain.scheduler.disturbance import CALM, Disturbance
from wantrain.scheduler.layout import lay_out
from wantrain.scheduler.script import (
    ACTIONS,
    BUCKET_CODING_S,
    BUCKETS,
    DECODE_S,
    ENCODE_S,
    END_ACTION,
    KIND,
    LANE_OUT,
    MICROBATCH,
    NEXT_ACTION,
    NOISE,
    NUM_BYTES,
    OUTLETS,
    PIECE_BYTES,
    RANK_OF,
    RANKS,
    RECORDS,
    SECONDS,
)


def test_actions_are_those_of_the_plan_with_each_ranks_seconds() -> None:
    plan = make_plan(2, 2, 3)
    workload = work(plan, forward_s=(1.0, 2.0, 3.0, 4.0), step_s=(0.1, 0.2, 0.3, 0.4))
    script = lay_out(plan, flat(4), workload, Disturbance(slow={"w3": 10.0}), is_recorded=False)
    first, end = script.column(RANKS, NEXT_ACTION), script.column(RANKS, END_ACTION)
    kinds, microbatches = script.column(ACTIONS, KIND), script.column(ACTIONS, MICROBATCH)
    seconds = script.column(ACTIONS, SECONDS, is_float=True)
    for rank in range(4):
        actions = plan.actions(plan.replica_of(rank))[plan.stage_of(rank)]
        own = slice(first[rank], end[rank])
        assert ["FBRS"[kind] for kind in kinds[own]] == [action.kind for action in actions]
        assert microbatches[own].tolist() == [action.microbatch for action in actions]
    assert seconds[first[1]] == 2.0
    assert seconds[first[3]] == 40.0
    assert seconds[end - 1].tolist() == [0.1, 0.2, 0.3, 4.0]


def test_outlets_hold_bytes_and_coding_of_each_direction() -> None:
    plan = make_plan(2, 1, 1)
    workload = work(
        plan, forward_bytes=(7, 0), backward_bytes=(0, 9), forward_encode_s=(0.5, 0.0), backward_decode_s=(0.25, 0)
    )
    script = lay_out(plan, flat(2), workload, CALM, is_recorded=False)
    assert script.column(OUTLETS, NUM_BYTES).tolist() == [7, 0, 0, 9]
    assert script.column(OUTLETS, LANE_OUT).tolist() == [0, -1, -1, 1]
    assert script.column(OUTLETS, ENCODE_S, is_float=True).tolist() == [0.5, 0, 0, 0]
    assert script.column(OUTLETS, DECODE_S, is_float=True).tolist() == [0, 0.25, 0, 0]


def test_buckets_are_cut_into_a_piece_for_every_member_where_there_are_several() -> None:
    plan = make_plan(2, 3, 1)
    workload = work(plan, bucket_bytes=((10, 20), (5,)), bucket_coding_s=(0.5, 0.25))
    script = lay_out(plan, flat(6), workload, CALM, is_recorded=False)
    assert script.column(BUCKETS, PIECE_BYTES).tolist() == [4, 7, 2] * 3
    assert script.column(BUCKETS, RANK_OF).tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert script.column(RANKS, BUCKET_CODING_S, is_float=True).tolist() == [0.5, 0.25] * 3
    alone = make_plan(2, 1, 1)
    none = lay_out(alone, flat(2), work(alone, bucket_bytes=((10,), (5,))), CALM, is_recorded=False)
    assert none.column(BUCKETS, RANK_OF).tolist() == []


def test_nothing_is_kept_for_records_or_deviates_that_nobody_asked_for() -> None:
    plan = make_plan(2, 1, 1)
    script = lay_out(plan, flat(2), work(plan), CALM, is_recorded=False)
    assert len(script.column(RECORDS, 0)) == 0
    assert script.column(NOISE, 0, is_float=True).tolist() == [0.0]
