import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.errors import PlanError
from wantrain.scheduler.network import make_network
from wantrain.scheduler.partition import best_cuts, split_for_workers, split_layers
from wantrain.scheduler.problem import Request, make_problem, make_state


@given(st.lists(st.floats(0, 10), min_size=1, max_size=7), st.integers(1, 7))
def test_the_split_is_the_best_of_all_splits(costs: list[float], stages: int) -> None:
    stages = min(stages, len(costs))
    got = max(sum(costs[first:end]) for first, end in split_layers(costs, stages))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    spans = [list(itertools.pairwise((0, *cut, len(costs)))) for cut in cuts]
    assert got == pytest.approx(min(max(sum(costs[a:b]) for a, b in span) for span in spans))


def test_more_stages_than_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"7 stages need as many layers \(the model has 6\)"):
        split_layers([1.0] * 6, 7)


@given(st.integers(0, 10_000))
def test_cuts_are_the_best_for_any_cost_of_any_stage(seed: int) -> None:
    tables = list(np.random.default_rng(seed).uniform(0, 1, (3, 7, 7)))
    every = [(0, *cut, 6) for cut in itertools.combinations(range(1, 6), 2)]
    costs = [max(tables[s][cut[s], cut[s + 1]] for s in range(3)) for cut in every]
    found = best_cuts(tables)
    assert found is not None
    assert max(tables[s][found[s], found[s + 1]] for s in range(3)) == pytest.approx(min(costs))


def problem_of(memory: str = "8 GB", speeds: tuple[float, ...] = (4e10, 1e10)):  # type: ignore[no-untyped-def]
    topology = with_speeds(regions({"a": len(speeds)}, memory=memory), list(speeds))
    network = make_network(topology, [worker.name for worker in topology.workers])
    problem = make_problem(Request(PROFILE, 8), network, len(speeds), 1, 8, 1)
    cuts = [0, *range(1, len(speeds)), len(PROFILE.layers)]
    return problem, make_state(problem, range(len(speeds)), cuts, [8])


def test_a_worker_four_times_as_fast_gets_most_of_the_layers() -> None:
    problem, state = problem_of()
    state.stage_room[:] = problem.memory
    cuts = split_for_workers(problem, state, [8.0])
    assert cuts is not None
    assert cuts[1] >= 4


def test_nothing_is_cut_where_nothing_fits() -> None:
    problem, state = problem_of("1 MB")
    state.stage_room[:] = problem.memory
    assert split_for_workers(problem, state, [8.0]) is None
