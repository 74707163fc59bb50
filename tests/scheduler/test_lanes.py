import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain.errors import PlanError
from wantrain.scheduler.lanes import deal_by_speed, deal_evenly, make_deck


def test_without_lanes_there_is_one_for_each_microbatch() -> None:
    assert make_deck(32, 4, None, 2) == (8, 8, 1, 1)


def test_lanes_are_dealt_in_units_that_fill_microbatches() -> None:
    deck = make_deck(16, 4, 8, 2)
    assert deck == (8, 4, 2, 1)
    assert deck.lanes_of([1, 3]) == [(0, 1), (2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("batch_size", "microbatch_size", "num_lanes", "num_replicas", "said"),
    [
        (10, 1, 4, 2, "4 lanes can't be drawn from evenly by 2 replicas in batches of 10"),
        (8, 1, 2, 3, "num_lanes must divide batch_size and be no less than num_replicas"),
        (12, 8, 3, 1, "12 samples a step don't fill microbatches of 8"),
    ],
)
def test_what_cant_be_dealt_is_refused(
    batch_size: int, microbatch_size: int, num_lanes: int, num_replicas: int, said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        make_deck(batch_size, microbatch_size, num_lanes, num_replicas)


@given(st.integers(1, 40), st.integers(1, 9))
def test_even_hands_differ_by_one_at_most(units: int, replicas: int) -> None:
    hands = deal_evenly(units, replicas)
    assert sum(hands) == units
    assert max(hands) - min(hands) <= 1


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 5)), min_size=2, max_size=3), st.integers(3, 9))
def test_dealing_by_speed_is_the_best_of_all_hands(replicas: list[tuple[float, float]], units: int) -> None:
    deck = make_deck(units, 1, None, len(replicas))
    fill_s, period_s = zip(*replicas, strict=True)

    def ends(hands: list[int]) -> float:
        return max(fill + (count - 1) * period for (fill, period), count in zip(replicas, hands, strict=True))

    hands = deal_by_speed(deck, fill_s, period_s)
    assert sum(hands) == units
    every = ([a, b, units - a - b][: len(replicas)] for a in range(1, units) for b in range(0, units))
    valid = [one for one in every if min(one) > 0 and sum(one) == units]
    assert ends(hands) == pytest.approx(min(map(ends, valid)))
