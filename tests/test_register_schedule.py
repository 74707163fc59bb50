"""A schedule of one's own: the same list is played in virtual time and for real, or refused where it can't go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import wantrain as wt
from tests.jobs import small_plan, train_job
from wantrain.errors import PlanError
from wantrain.plan import Plan
from wantrain.schedule import default_in_flight, make_schedule, unregister_schedule


def in_pairs(num_stages: int, num_microbatches: int) -> list[str]:
    """Two forwards, two backwards, by turns: twice 1F1B's depth."""
    depths = [min(num_microbatches, 2 * (num_stages - stage)) for stage in range(num_stages)]
    turns = [(num_microbatches - depth) // 2 for depth in depths]
    return ["F" * depth + "BBFF" * turn + "B" * depth for depth, turn in zip(depths, turns, strict=True)]


@pytest.fixture
def own() -> Iterator[None]:
    wt.register_schedule("own", in_pairs)
    yield
    unregister_schedule("own")


@pytest.mark.usefixtures("own")
def test_its_texts_become_actions_in_the_order_of_microbatches() -> None:
    stages = make_schedule("own", 2, 6)
    assert " ".join(map(repr, stages[0])) == "0F0 0F1 0F2 0F3 0B0 0B1 0F4 0F5 0B2 0B3 0B4 0B5 0R 0S"
    assert " ".join(map(repr, stages[1])) == "1F0 1F1 1B0 1B1 1F2 1F3 1B2 1B3 1F4 1F5 1B4 1B5 1R 1S"
    assert default_in_flight("own", 2, 6) == (4, 2)


@pytest.mark.usefixtures("own")
def test_a_plan_carries_it_and_what_is_played_gives_the_numbers_of_any_other_order() -> None:
    own, known = small_plan(2, 1, schedule="own"), small_plan(2, 1)
    assert [stage.max_in_flight for stage in own.stages] == [4, 2]
    assert own.prediction is not None
    assert known.prediction is not None
    assert own.prediction.step_s > 0
    assert Plan.model_validate_json(own.model_dump_json()) == own
    assert [one.losses for one in train_job(own)] == [one.losses for one in train_job(known)]


@pytest.mark.usefixtures("own")
def test_another_depth_can_not_be_asked_of_it() -> None:
    with pytest.raises(PlanError, match="for schedule 1f1b"):
        small_plan(2, 1, schedule="own", max_in_flight=(3, 1))


@pytest.mark.usefixtures("own")
def test_what_was_registered_anew_is_what_is_planned() -> None:
    deep = small_plan(2, 1, schedule="own")
    wt.register_schedule("own", lambda stages, microbatches: ["F" * microbatches + "B" * microbatches] * stages)
    flush = small_plan(2, 1, schedule="own")
    assert [stage.max_in_flight for stage in flush.stages] == [8, 8]
    gpipe = small_plan(2, 1, schedule="gpipe")
    assert flush.prediction is not None
    assert deep.prediction is not None
    assert gpipe.prediction is not None
    assert flush.prediction.step_s == gpipe.prediction.step_s


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda stages, _: ["FB"] * stages, "has 1 F, 1 B, 0 W among 2 actions of stage 0 (expected 2 F"),
        (lambda stages, _: ["FXFBB"] * stages, "among 5 actions of stage 0"),
        (lambda *_: ["FFBB"], "has 1 stages (expected 2); return a text for each"),
        (lambda *_: ["FBFB", "FFBB"], "can't go on: all stages wait for others (after {0: 'FB', 1: 'FF'})"),
        (lambda *_: ["BFFB", "FFBB"], "can't go on"),
        (lambda *_: ["FFBB", "FFWWBB"], "can't go on"),
        (lambda *_: ["FFBB", "FFBWB"], "has 2 F, 2 B, 1 W among 5 actions of stage 1"),
    ],
)
@pytest.mark.usefixtures("own")
def test_an_order_that_can_not_be_is_refused(make: Callable[[int, int], list[str]], said: str) -> None:
    wt.register_schedule("own", make)
    with pytest.raises(PlanError) as caught:
        make_schedule("own", 2, 2)
    assert said in str(caught.value)


@pytest.mark.usefixtures("own")
def test_a_stage_of_it_may_leave_gradients_of_weights_for_later() -> None:
    wt.register_schedule("own", lambda stages, n: ["FB" * n] * (stages - 1) + ["F" * n + "BBWW" * (n // 2)])
    with pytest.raises(PlanError, match="can't go on"):
        make_schedule("own", 2, 4)
    wt.register_schedule("own", lambda stages, n: ["F" * n + "B" * n] * (stages - 1) + ["F" * n + "BBWW" * (n // 2)])
    plan = small_plan(2, 1, schedule="own")
    assert [(stage.max_in_flight, stage.max_postponed) for stage in plan.stages] == [(8, 0), (8, 1)]
    assert [one.losses for one in train_job(plan)] == [one.losses for one in train_job(small_plan(2, 1))]


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zero_bubble", "two words", ""])
def test_a_name_that_can_not_be_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="a schedule can't be called"):
        wt.register_schedule(name, in_pairs)


def test_a_plan_with_an_unknown_schedule_names_those_there_are() -> None:
    with pytest.raises(
        PlanError, match=r"unknown schedule 'own'.*one of gpipe, 1f1b, zero_bubble, or one that this process"
    ):
        small_plan(1, 1, schedule="own")
