import random

import pytest

from bench_scheduler import SCENARIOS, load_scenario, random_case, run_replan, scattered_topology


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_whole_and_symmetric(name: str) -> None:
    delay_s, rate = load_scenario(name)
    assert delay_s.shape == rate.shape == (64, 64)
    assert (delay_s == delay_s.T).all()
    assert (rate == rate.T).all()
    assert 0 <= delay_s.max() < 0.3


def test_random_cases_are_as_large_and_uneven_as_they_should_be() -> None:
    generator = random.Random(0)
    cases = [random_case(generator, number) for number in range(40)]
    sizes = [len(case["topology"].workers) for case in cases]
    assert sum(size in (7, 8) for size in sizes) >= 20
    assert max(sizes) == 8
    speeds = [worker.flops_per_s for case in cases for worker in case["topology"].workers]
    assert 3 < max(speeds) / min(speeds) <= 4


def test_volunteers_come_in_no_order_of_sites() -> None:
    topology = scattered_topology(64, 8)
    sites = [worker.site for worker in topology.workers]
    assert len(set(sites)) == 8
    assert sites != sorted(sites)


def test_a_plan_to_go_on_with_is_as_good_as_a_fresh_one_and_moves_no_more() -> None:
    record = run_replan(3, seed=1)
    assert record["cases"] == 3
    assert record["worst_longer"] <= 0.03
    assert record["moved_bytes"] <= record["fresh_moved_bytes"]
