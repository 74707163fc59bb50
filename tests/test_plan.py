import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import change, small_plan
from wantrain.errors import PlanError
from wantrain.plan import Plan


def test_ranks_run_replica_by_replica_stage_by_stage() -> None:
    plan = small_plan(3, 2)
    for rank, name in enumerate(plan.workers):
        assert plan.rank_of(name) == rank
        assert plan.rank_at(plan.replica_of(rank), plan.stage_of(rank)) == rank
    assert plan.data_group(1) == (1, 4)
    assert plan.world_size == 6


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = small_plan(3, 2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_actions_follow_each_replicas_own_microbatches() -> None:
    plan = small_plan(2, 2, batch_size=6, num_lanes=3)
    assert [len(plan.actions(replica)[0]) for replica in range(2)] == [2 * 2 + 2, 2 * 4 + 2]


def test_an_unknown_worker_is_named_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"the plan has no worker 'x' \(it has w-0"):
        small_plan(2, 1).rank_of("x")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"version": 99}, "plan version 99 is not 1"),
        ({"num_layers": 7}, r"the stages end at layer 5 \(the model has 7 layers\)"),
        ({"num_lanes": 3}, "the replicas' lanes must be 0–2, each once"),
        ({"batch_size": 9}, "a batch of 9 can't be drawn evenly from 4 lanes"),
        ({"batch_size": 16}, "replica 0 draws 8 samples a step, which 4 microbatches of 1 don't hold"),
        ({"boundaries": []}, r"2 stages have 1 boundaries \(got 0\)"),
        ({"boundaries": [{"transports": [{}]}]}, "transports are one per replica"),
        ({"schedules": "1f1b"}, r"unknown key 'schedules' \(did you mean 'schedule'\?\)"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason) as caught:
        change(small_plan(2, 2), **values)
    assert "\n" not in str(caught.value)


def test_a_worker_named_twice_is_refused() -> None:
    plan = small_plan(1, 2)
    replicas = [replica.model_dump() | {"workers": ["w-0"]} for replica in plan.replicas]
    with pytest.raises(PlanError, match="worker 'w-0' is named twice"):
        change(plan, replicas=replicas)


def test_depths_that_grow_are_refused() -> None:
    plan = small_plan(2, 1)
    stages = [stage.model_dump() | {"max_in_flight": i + 1} for i, stage in enumerate(plan.stages)]
    with pytest.raises(PlanError, match="must not grow"):
        change(plan, stages=stages)


def test_a_file_that_is_no_plan_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[]")
    with pytest.raises(PlanError, match="is not a JSON object"):
        Plan.load(path)
    path.write_text(json.dumps({"version": 1}))
    with pytest.raises(PlanError, match="missing key 'topology'"):
        Plan.load(path)
