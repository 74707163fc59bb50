import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cases import PROFILE, regions, with_speeds
from wantrain.scheduler.cost_model import make_workload
from wantrain.scheduler.draft import Drafter, Placement
from wantrain.scheduler.estimate import HELPERS, price_all
from wantrain.scheduler.lanes import make_deck
from wantrain.scheduler.native import compiled
from wantrain.scheduler.network import make_network
from wantrain.scheduler.problem import Request, as_arrays, make_problem, make_state
from wantrain.scheduler.simulator import step_s

SPEEDS = [1e10, 2e10, 3e10, 4e10]


def estimate_and_play(order: list[int], cut: int, replicas: int, far: str) -> tuple[float, float]:
    """Return what is estimated of a placement of four workers in two sites, and what the simulator says."""
    topology = with_speeds(regions({"a": 2, "b": 2}, far=far), SPEEDS)
    network = make_network(topology, [worker.name for worker in topology.workers])
    stages = 4 // replicas
    request = Request(PROFILE, 8 * replicas, max_in_flight=(8,) * stages)
    problem = make_problem(request, network, stages, replicas, replicas, 8)
    cuts = (0, cut, 6) if stages == 2 else (0, 1, 2, cut, 6)
    state = make_state(problem, order, cuts, [8] * replicas)
    rows = tuple(tuple(order[r * stages : (r + 1) * stages]) for r in range(replicas))
    drafter = Drafter(request, topology, network, make_deck(8 * replicas, 1, replicas, replicas))
    plan = drafter.plan(Placement(rows, cuts, (1,) * replicas), (8,) * stages)
    return price_all(problem, state), step_s(plan, topology, make_workload(plan, topology, PROFILE))


@settings(max_examples=30, deadline=None)
@given(
    st.permutations(range(4)),
    st.integers(3, 5),
    st.sampled_from([1, 2]),
    st.sampled_from(["50 Mbit/s", "5 Gbit/s"]),
)
def test_the_estimate_is_near_what_the_simulator_plays(order: list[int], cut: int, replicas: int, far: str) -> None:
    estimated, played = estimate_and_play(order, cut, replicas, far)
    assert estimated == pytest.approx(played, rel=0.35)


def test_machine_code_comes_to_the_same_price_to_the_last_bit() -> None:
    topology = with_speeds(regions({"a": 2, "b": 2}), SPEEDS)
    network = make_network(topology, [worker.name for worker in topology.workers])
    problem = make_problem(Request(PROFILE, 16), network, 2, 2, 16, 1)
    state = make_state(problem, [2, 0, 3, 1], (0, 4, 6), [8, 8])
    assert compiled(price_all, *HELPERS)(as_arrays(problem), as_arrays(state)) == price_all(problem, state)


def test_missing_memory_costs_more_than_any_slowness() -> None:
    prices = []
    for memory in ("8 GB", "10 MB"):
        topology = regions({"a": 2}, memory=memory)
        network = make_network(topology, [worker.name for worker in topology.workers])
        problem = make_problem(Request(PROFILE, 8), network, 2, 1, 8, 1)
        prices.append(price_all(problem, make_state(problem, [0, 1], (0, 3, 6), [8])))
    assert prices[1] > 10 * prices[0]
