"""A new plan: as good as a fresh one within 3 %, with no more bytes to move."""

import pytest

from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.cost_model import predict
from wantrain.scheduler.replan import NEAR, moved_bytes, replan
from wantrain.scheduler.solve import make_plan
from wantrain.topology import Topology

MODEL = ModelConfig(num_layers=6, hidden=64, num_heads=4, seq_len=64)
PROFILE = gpt_profile(MODEL, 2)
CHOICES = {"batch_size": 16, "num_stages": 2, "num_replicas": 2, "num_lanes": 4}


def two_sites() -> Topology:
    return Topology.load(find_config("topologies", "two_sites", TopologyError))


@pytest.fixture(scope="module")
def old():  # type: ignore[no-untyped-def]
    return make_plan(two_sites(), PROFILE, **CHOICES)


def test_nothing_moves_where_nothing_has_changed(old) -> None:  # type: ignore[no-untyped-def]
    found = replan(old, two_sites(), PROFILE, **CHOICES)
    assert found.moved_bytes == 0
    assert found.plan.workers == old.workers


def test_a_degraded_link_gives_a_plan_near_the_best_that_moves_no_more_than_a_fresh_one(old) -> None:  # type: ignore[no-untyped-def]
    changed = two_sites().with_link("east", "west", bandwidth_bytes_per_s=1e6 / 8)
    found = replan(old, changed, PROFILE, **CHOICES)
    best_s = min(found.fresh.prediction.step_s, found.old_step_s)
    assert found.plan.prediction.step_s <= NEAR * best_s
    assert found.moved_bytes <= found.fresh_moved_bytes
    assert found.plan.prediction.step_s == pytest.approx(predict(found.plan, changed, PROFILE).step_s)


def test_a_worker_that_is_gone_is_replaced_and_the_others_keep_what_they_hold(old) -> None:  # type: ignore[no-untyped-def]
    topology = two_sites()
    gone = old.workers[-1]
    spare = topology.worker(gone).model_copy(update={"name": "spare"})
    workers = (*(worker for worker in topology.workers if worker.name != gone), spare)
    found = replan(old, topology.model_copy(update={"workers": workers}), PROFILE, **CHOICES)
    assert found.old_step_s is None
    assert gone not in found.plan.workers
    last = old.stages[-1]
    own = sum(PROFILE.layers[layer].parameter_bytes for layer in range(last.first_layer, last.end_layer))
    assert found.moved_bytes <= max(3 * own, found.fresh_moved_bytes)


def test_too_few_workers_left_is_said(old) -> None:  # type: ignore[no-untyped-def]
    topology = two_sites()
    few = topology.model_copy(update={"workers": topology.workers[:3]})
    with pytest.raises(PlanError, match="need 4 workers"):
        replan(old, few, PROFILE, **CHOICES)


def test_moving_a_layer_moves_its_weights_and_both_moments(old) -> None:  # type: ignore[no-untyped-def]
    swapped = old.model_copy(
        update={"replicas": tuple(one.model_copy(update={"workers": one.workers[::-1]}) for one in old.replicas)}
    )
    assert moved_bytes(old, old, PROFILE) == 0
    assert moved_bytes(old, swapped, PROFILE) == 3 * 2 * PROFILE.parameter_bytes
