import subprocess
import sys

import pytest

from tests.jobs import flat_topology
from tests.scheduler.cases import regions, shuffled, with_speeds
from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.plan import Plan
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.solve import find_plan, make_plan, naive_plan, sites_together_plan
from wantrain.topology import Topology

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=64)
PROFILE = gpt_profile(MODEL, 2)


def two_sites() -> Topology:
    return Topology.load(find_config("topologies", "two_sites", TopologyError))


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
    with pytest.raises(PlanError, match=r"stage \d needs .* \(has 1 MB\), 6.29 MB of it for channels; add"):
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


def step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def test_shapes_are_searched_where_none_is_given() -> None:
    topology = shuffled(with_speeds(regions({"a": 3, "b": 3}, far="50 Mbit/s"), [4e10, 4e10, 1e10, 3e10, 3e10, 3e10]))
    search = find_plan(topology, PROFILE, batch_size=16)
    assert search.naive is not None
    assert search.together is not None
    assert step_s(search.plan) <= min(step_s(search.naive), step_s(search.together))
    for shape in ((1, 2), (2, 1), (2, 2), (3, 2)):
        given = make_plan(topology, PROFILE, batch_size=16, num_stages=shape[0], num_replicas=shape[1])
        assert step_s(search.plan) <= 1.02 * step_s(given)


def test_the_same_inputs_give_the_same_plan() -> None:
    topology = shuffled(regions({"a": 3, "b": 3}))
    first, second = (make_plan(topology, PROFILE, batch_size=16, seed=3) for _ in range(2))
    assert first == second


def test_a_worker_that_would_slow_the_rest_is_left_out_and_named() -> None:
    topology = with_speeds(regions({"a": 4}), [4e10, 4e10, 4e10, 4e8])
    search = find_plan(topology, PROFILE, batch_size=16)
    assert search.left_out == ("a-3",)
    assert search.notes[0].startswith("a-3 left out: ")


def test_replicas_of_slow_workers_draw_fewer_lanes() -> None:
    topology = with_speeds(regions({"a": 2}), [4e10, 1e10])
    plan = make_plan(topology, PROFILE, batch_size=20, num_stages=1, num_replicas=2)
    by_worker = {replica.workers[0]: replica.num_microbatches for replica in plan.replicas}
    assert by_worker == {"a-0": 8, "a-1": 2}


def test_fast_workers_get_more_layers() -> None:
    topology = with_speeds(regions({"a": 2}), [4e10, 1e10])
    plan = make_plan(topology, gpt_profile(MODEL, 1), batch_size=16, num_stages=2, num_replicas=1)
    layers = {name: stage.end_layer - stage.first_layer for name, stage in zip(plan.workers, plan.stages, strict=True)}
    assert layers["a-0"] > layers["a-1"]


def test_scattered_workers_of_a_site_come_together() -> None:
    topology = shuffled(regions({"a": 4, "b": 4}, far="20 Mbit/s"))
    naive = naive_plan(topology, PROFILE, batch_size=16, num_stages=4, num_replicas=2)
    plan = make_plan(topology, PROFILE, batch_size=16, num_stages=4, num_replicas=2)
    together = sites_together_plan(topology, PROFILE, batch_size=16, num_stages=4, num_replicas=2)
    assert step_s(plan) <= step_s(together)
    assert 2 * step_s(plan) <= step_s(naive)


def test_pinned_workers_hold_their_stage_and_excluded_ones_none() -> None:
    topology = regions({"a": 3, "b": 3})
    plan = make_plan(
        topology, PROFILE, batch_size=8, num_stages=2, num_replicas=2, pinned={"a-0": 1, "b-1": 1}, excluded=["a-2"]
    )
    assert {row.workers[1] for row in plan.replicas} == {"a-0", "b-1"}
    assert "a-2" not in plan.workers


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"pinned": {"a-9": 0}}, r"pinned worker 'a-9' is not in topology 'regions' \(did you mean 'a-\d'\?\)"),
        ({"excluded": ["nobody"]}, "excluded worker 'nobody' is not in topology"),
        ({"excluded": ["a-0", "a-1"]}, "all 2 workers are excluded; leave at least one"),
        ({"excluded": ["a-0"], "num_stages": 2}, r"need 2 workers \(1 may take part\)"),
        ({"pinned": {"a-0": 0}, "excluded": ["a-0"]}, "worker 'a-0' is both pinned and excluded"),
        ({"pinned": {"a-0": 5}}, "the pinned workers need stage 5"),
        ({"max_in_flight": [2, 1], "schedule": "gpipe"}, "max_in_flight is 2 numbers above zero, for schedule 1f1b"),
    ],
)
def test_what_cant_be_asked_is_refused_in_one_line(choices: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(regions({"a": 2}), PROFILE, batch_size=8, **choices)  # type: ignore[arg-type]


def test_an_objective_takes_the_place_of_the_steps_seconds() -> None:
    topology = regions({"a": 4})
    fastest = make_plan(topology, PROFILE, batch_size=16)
    fewest = make_plan(topology, PROFILE, batch_size=16, objective=lambda plan: plan.world_size)
    assert fastest.world_size > fewest.world_size == 1


def test_memory_makes_the_pipeline_longer() -> None:
    profile = gpt_profile(ModelConfig(num_layers=8, hidden=512, num_heads=8, seq_len=64), 1)
    small = regions({"a": 6}, memory=f"{3 * profile.parameter_bytes} B")
    assert make_plan(small, profile, batch_size=16).num_stages > 1


def test_a_time_limit_still_gives_a_plan() -> None:
    plan = make_plan(regions({"a": 4, "b": 4}), PROFILE, batch_size=16, time_limit_s=0.0)
    assert step_s(plan) > 0


def test_eight_workers_are_planned_without_numba() -> None:
    code = (
        "import sys; from tests.scheduler.cases import *; from wantrain.scheduler.solve import make_plan\n"
        "make_plan(regions({'a': 4, 'b': 4}), PROFILE, batch_size=16); assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_sixteen_workers_take_the_compiled_path() -> None:
    topology = shuffled(regions({"a": 8, "b": 8}, far="50 Mbit/s"))
    search = find_plan(topology, PROFILE, batch_size=64)
    assert search.naive is not None
    assert step_s(search.plan) <= step_s(search.naive)


def test_flat_topologies_stay_simple() -> None:
    plan = make_plan(flat_topology(2), PROFILE, batch_size=8, num_stages=2, num_replicas=1)
    assert sorted(plan.workers) == ["w-0", "w-1"]
