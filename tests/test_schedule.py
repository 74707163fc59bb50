import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain.errors import PlanError
from wantrain.schedule import Action, make_schedule, peak_in_flight, peak_postponed


def drawing(
    kind: str, stages: int, microbatches: int, depths: list[int] | None = None, postponed: list[int] | None = None
) -> list[str]:
    schedule = make_schedule(kind, stages, microbatches, depths, postponed)  # type: ignore[arg-type]
    return [" ".join(repr(action)[1:] for action in actions if action.kind in "FBW") for actions in schedule]


def test_gpipe_runs_all_forwards_first() -> None:
    assert drawing("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_is_the_staircase() -> None:
    assert drawing("1f1b", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_deeper_warm_up_runs_further_ahead() -> None:
    assert drawing("1f1b", 3, 4, [4, 3, 1]) == [
        "F0 F1 F2 F3 B0 B1 B2 B3",
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_zero_bubble_leaves_gradients_of_weights_for_when_a_stage_would_wait() -> None:
    assert drawing("zero_bubble", 3, 4) == [
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3",
        "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]
    assert drawing("zero_bubble", 2, 3, [2, 1], [0, 0]) == ["F0 F1 B0 W0 F2 B1 W1 B2 W2", "F0 B0 W0 F1 B1 W1 F2 B2 W2"]
    assert drawing("zero_bubble", 2, 3, [2, 1], [3, 3])[1] == "F0 B0 F1 B1 F2 B2 W0 W1 W2"


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(*(st.lists(st.integers(low, 9), min_size=n, max_size=n) for low in (1, 0)))
    ),
    st.integers(1, 12),
)
def test_a_split_backward_makes_every_gradient_once_within_what_may_wait(
    bounds: tuple[list[int], list[int]], microbatches: int
) -> None:
    depths, postponed = sorted(bounds[0], reverse=True), bounds[1]
    for stage, actions in enumerate(make_schedule("zero_bubble", len(depths), microbatches, depths, postponed)):
        for kind in "FBW":
            assert [one.microbatch for one in actions if one.kind == kind] == list(range(microbatches))
        for m in range(microbatches):
            assert actions.index(Action(stage, "B", m)) < actions.index(Action(stage, "W", m))
        assert peak_in_flight(actions) == min(depths[stage], microbatches)
        assert peak_postponed(actions) <= postponed[stage]


def test_a_step_ends_with_reduce_and_step() -> None:
    assert repr(make_schedule("1f1b", 1, 1)) == "((0F0, 0B0, 0R, 0S),)"


@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(1, 9), min_size=n, max_size=n)), st.integers(1, 12))
def test_every_microbatch_goes_forward_then_backward_once_within_the_depth(
    depths: list[int], microbatches: int
) -> None:
    depths.sort(reverse=True)
    for stage, actions in enumerate(make_schedule("1f1b", len(depths), microbatches, depths)):
        for m in range(microbatches):
            assert actions.index(Action(stage, "F", m)) < actions.index(Action(stage, "B", m))
        assert len(actions) == 2 * microbatches + 2
        assert peak_in_flight(actions) == min(depths[stage], microbatches)


@pytest.mark.parametrize(
    ("kind", "stages", "microbatches", "depths", "reason"),
    [
        ("1f2b", 1, 1, None, "did you mean '1f1b'"),
        ("1f1b", 0, 1, None, "needs a stage"),
        ("1f1b", 2, 2, [1, 2], "do not grow"),
        ("1f1b", 2, 2, [0, 0], "above zero"),
        ("1f1b", 2, 2, [2], "2 numbers"),
    ],
)
def test_impossible_schedules_are_refused(
    kind: str, stages: int, microbatches: int, depths: list[int], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        make_schedule(kind, stages, microbatches, depths)  # type: ignore[arg-type]


def test_what_can_not_wait_is_refused() -> None:
    for postponed in ([1], [1, -1]):
        with pytest.raises(PlanError, match="max_postponed must be 2 numbers"):
            make_schedule("zero_bubble", 2, 2, [2, 1], postponed)
