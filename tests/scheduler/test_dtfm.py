import itertools

import numpy as np
import pytest

from bench_scheduler import ROUNDING, SCENARIOS, load_scenario
from wantrain.scheduler import dtfm


def small(seed: int = 0) -> tuple[dtfm.Table, dtfm.Table]:
    generator = np.random.default_rng(seed)
    delay, rate = generator.uniform(0.001, 0.1, (4, 4)), generator.uniform(0.3, 5, (4, 4))
    return (delay + delay.T) / 2, (rate + rate.T) / 2


def test_the_cost_is_that_of_the_formula() -> None:
    delay, rate = small()
    exchange = [2 * (delay[a, b] + 8 * 0.65 / (rate[a, b] * 2)) for a, b in ((0, 1), (2, 3))]
    sends = [delay[a, b] + 8 * dtfm.ACTIVATION_GB / rate[a, b] for a, b in ((0, 2), (1, 3))]
    assert dtfm.cost([(0, 1), (2, 3)], delay, rate) == pytest.approx(max(exchange) + 2 * max(sends))


@pytest.mark.parametrize("seed", range(3))
def test_of_four_devices_the_best_layout_is_found(seed: int) -> None:
    delay, rate = small(seed)
    best = min(dtfm.cost([order[:2], order[2:]], delay, rate) for order in itertools.permutations(range(4)))
    found = dtfm.solve(delay, rate, 2, 2)
    assert found.cost == pytest.approx(best)
    assert found.cost == pytest.approx(dtfm.cost(found.stages, delay, rate))


@pytest.mark.parametrize("name", SCENARIOS)
def test_published_scenarios_are_solved_as_well_as_is_known(name: str) -> None:
    delay, rate = load_scenario(name)
    found = dtfm.solve(delay, rate, 8, 8)
    _, theirs, known = SCENARIOS[name]
    assert sorted(itertools.chain.from_iterable(found.stages)) == list(range(64))
    assert found.cost <= min(theirs, known) + ROUNDING
