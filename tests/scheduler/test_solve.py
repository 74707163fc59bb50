import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.solve import make_plan, split_layers
from wantrain.topology import Topology

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=64)
PROFILE = gpt_profile(MODEL, 2)


def two_sites() -> Topology:
    return Topology.load(find_config("topologies", "two_sites", TopologyError))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=7), st.integers(1, 7))
def test_the_split_is_the_best_of_all_splits(costs: list[float], stages: int) -> None:
    stages = min(stages, len(costs))
    got = max(sum(costs[first:end]) for first, end in split_layers(costs, stages))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    spans = [list(itertools.pairwise((0, *cut, len(costs)))) for cut in cuts]
    assert got == pytest.approx(min(max(sum(costs[a:b]) for a, b in span) for span in spans))


def test_more_stages_than_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"7 stages need as many layers \(the model has 6\)"):
        make_plan(
            Topology.parse(
                {
                    "worker": [{"name": "w", "count": 7, "site": "s"}],
                    "name": "t",
                    "link": [{"within": "s", "bandwidth": "1 Gbit/s"}],
                },
                TopologyError,
                "t",
            ),
            PROFILE,
            batch_size=8,
            num_stages=7,
        )


def test_too_few_workers_are_refused() -> None:
    with pytest.raises(PlanError, match="need 6 workers"):
        make_plan(two_sites(), PROFILE, batch_size=12, num_stages=3, num_replicas=2)


def test_a_plan_uses_each_worker_once_and_deals_all_lanes() -> None:
    plan = make_plan(two_sites(), PROFILE, batch_size=16, num_stages=2, num_replicas=2, num_lanes=4)
    assert sorted(plan.workers) == ["a-0", "a-1", "b-0", "b-1"]
    assert sorted(lane for replica in plan.replicas for lane in replica.lanes) == [0, 1, 2, 3]
    assert plan.prediction is not None
    assert plan.prediction.step_s > 0


def test_uneven_lanes_give_uneven_microbatch_counts() -> None:
    plan = make_plan(two_sites(), PROFILE, batch_size=12, num_stages=1, num_replicas=2, num_lanes=3)
    assert [replica.num_microbatches for replica in plan.replicas] == [2, 4]


def test_a_worker_without_enough_memory_is_named_with_both_figures() -> None:
    small = two_sites()
    workers = tuple(worker.model_copy(update={"memory_bytes": 1_000_000}) for worker in small.workers)
    with pytest.raises(PlanError, match=r"stage 0 needs .* on worker '.*' \(has 1 MB\); add a worker"):
        make_plan(small.model_copy(update={"workers": workers}), PROFILE, batch_size=8, num_stages=2)


def test_a_slow_link_makes_the_plan_run_deeper_ahead() -> None:
    topology = two_sites()
    slow = topology.dilated(50)
    near = make_plan(topology, PROFILE, batch_size=32, num_stages=2)
    far = make_plan(slow.model_copy(update={"workers": slow.workers}), PROFILE, batch_size=32, num_stages=2)
    assert sum(stage.max_in_flight for stage in far.stages) >= sum(stage.max_in_flight for stage in near.stages)


def test_a_shared_uplink_bounds_what_is_under_way() -> None:
    topology = Topology.parse(
        {
            "name": "home",
            "worker": [{"name": "w", "count": 3, "site": "s", "uplink": "100 Mbit/s"}],
            "link": [{"within": "s", "bandwidth": "1 Gbit/s"}],
        },
        TopologyError,
        "home",
    )
    plan = make_plan(topology, PROFILE, batch_size=8, num_stages=3)
    assert list(plan.under_way_bytes) == ["w-1"]
