import random

import pytest

from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.scheduler.estimate import price, price_all
from wantrain.scheduler.network import make_network
from wantrain.scheduler.placement import anneal, change, compiled_anneal, may_hold, next_random
from wantrain.scheduler.problem import Problem, Request, State, as_arrays, make_problem, make_state

SPEEDS = [1e10, 3e10, 2e10, 4e10, 2e10, 1e10]


def start(pinned: dict[str, int] | None = None) -> tuple[Problem, State]:
    topology = with_speeds(regions({"a": 3, "b": 3}), SPEEDS)
    network = make_network(topology, [worker.name for worker in topology.workers])
    problem = make_problem(Request(PROFILE, 16, pinned=pinned or {}), network, 2, 2, 16, 1)
    return problem, make_state(problem, range(6), (0, 4, 6), [8, 8])


@pytest.mark.parametrize("kind", range(5))
def test_every_change_is_undone_by_itself_turned_round_and_prices_stay_exact(kind: int) -> None:
    problem, state = start()
    before, cells, cuts = price_all(problem, state), list(state.cells), list(state.cuts)
    for i, j in ((0, 1), (1, 0)):
        if change(problem, state, kind, i, j):
            then = price(problem, state)
            assert then == price_all(problem, make_state(problem, state.cells, state.cuts, state.counts))
            change(problem, state, kind, j, i)
        assert (price(problem, state), state.cells, state.cuts) == (before, cells, cuts)


def test_incremental_prices_equal_those_from_scratch_over_many_swaps() -> None:
    problem, state = start()
    price_all(problem, state)
    generator = random.Random(1)
    for _ in range(200):
        assert change(problem, state, 0, generator.randrange(4), generator.randrange(6))
        again = make_state(problem, state.cells, state.cuts, state.counts)
        assert price(problem, state) == price_all(problem, again)


def test_a_search_ends_with_the_best_it_has_met() -> None:
    problem, state = start()
    before = price_all(problem, state)
    after = anneal(problem, state, list(state.cells), list(state.cuts), 300, 0.3, 7)
    assert after < before
    assert sorted(state.cells) == list(range(6))
    assert after == price_all(problem, make_state(problem, state.cells, state.cuts, state.counts))


def test_machine_code_makes_the_same_search() -> None:
    problem, plain = start()
    arrays = as_arrays(plain)
    price_plain = anneal(problem, plain, list(plain.cells), list(plain.cuts), 300, 0.3, 7)
    rest = (arrays.cells.copy(), arrays.cuts.copy(), 300, 0.3, 7)
    assert compiled_anneal(as_arrays(problem), arrays, *rest) == price_plain
    assert arrays.cells.tolist() == plain.cells
    assert arrays.cuts.tolist() == plain.cuts


def test_pinned_workers_never_leave_their_stage() -> None:
    problem, state = start({"a-1": 1})
    anneal(problem, state, list(state.cells), list(state.cuts), 300, 0.3, 7)
    assert state.cells.index(1) in (1, 3)
    assert may_hold(problem, 1, 3)
    assert not may_hold(problem, 1, 5)


def test_random_numbers_are_those_of_park_and_miller() -> None:
    number = 1
    for _ in range(10_000):
        number = next_random(number)
    assert number == 399268537
