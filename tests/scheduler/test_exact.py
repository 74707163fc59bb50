import itertools
import random

import pytest

from bench_scheduler import random_case, step_s
from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.errors import PlanError
from wantrain.scheduler.cost_model import make_workload
from wantrain.scheduler.draft import Drafter, Placement
from wantrain.scheduler.exact import exact_plan, layouts, splits
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.network import make_network
from wantrain.scheduler.problem import Request
from wantrain.scheduler.simulator import step_s as play
from wantrain.scheduler.solve import make_plan


@pytest.mark.parametrize(("workers", "stages", "replicas", "count"), [(4, 2, 2, 12), (3, 2, 1, 6), (4, 1, 3, 4)])
def test_every_grid_is_listed_once(workers: int, stages: int, replicas: int, count: int) -> None:
    grids = layouts(workers, stages, replicas)
    assert len(grids) == count
    assert len({frozenset(map(tuple, grid.tolist())) for grid in grids}) == count


def test_every_split_is_listed() -> None:
    assert list(splits(4, 2)) == [(0, 1, 4), (0, 2, 4), (0, 3, 4)]


@pytest.mark.parametrize("far", ["20 Mbit/s", "1 Gbit/s"])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 2), (3, 1), (1, 4), (4, 1)])
def test_bounds_never_hide_the_best(far: str, stages: int, replicas: int) -> None:
    """Against all plans of a shape, played without any bound."""
    topology = with_speeds(regions({"a": 2, "b": 2}, far=far), [1e10, 2e10, 3e10, 4e10])
    depths = [2 * (stages - stage) for stage in range(stages)]
    exact = exact_plan(
        topology, PROFILE, batch_size=3 * replicas, num_stages=stages, num_replicas=replicas, max_in_flight=depths
    )
    network = make_network(topology, [worker.name for worker in topology.workers])
    deck = make_deck(3 * replicas, 1, replicas, replicas)
    drafter = Drafter(Request(PROFILE, 3 * replicas), topology, network, deck)
    grids = [tuple(map(tuple, grid.tolist())) for grid in layouts(4, stages, replicas)]
    plans = (
        drafter.plan(Placement(rows, cuts, (1,) * replicas), depths)
        for rows, cuts in itertools.product(grids, splits(len(PROFILE.layers), stages))
    )
    every = min(play(plan, topology, make_workload(plan, topology, PROFILE)) for plan in plans)
    assert exact.step_s == pytest.approx(every)
    assert 0 < exact.num_played <= exact.num_candidates


def test_too_many_workers_are_refused() -> None:
    with pytest.raises(PlanError, match=r"too many workers to try all plans \(got 9, expected at most 8\)"):
        exact_plan(regions({"a": 9}), PROFILE, batch_size=8, num_stages=1, num_replicas=1, max_in_flight=[1])


def test_a_sample_of_random_cases_is_solved_within_a_few_percent() -> None:
    """Two hundred of them: python benchmarks/bench_scheduler.py --quality 200."""
    generator = random.Random(5)
    found = []
    for number in range(8):
        case = random_case(generator, 2 * number + 2)
        topology, profile = case.pop("topology"), case.pop("profile")
        try:
            exact = exact_plan(topology, profile, **case)
        except PlanError:
            continue
        plan = make_plan(topology, profile, num_lanes=case["num_replicas"], **case)
        found.append(step_s(plan) / exact.step_s)
    assert len(found) > 3
    assert min(found) >= 1 - 1e-9
    assert sum(found) / len(found) <= 1.03
