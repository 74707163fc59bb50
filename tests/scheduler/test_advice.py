"""Advice: the change that is said to help most does, by as much as is said."""

import pytest

from tests.jobs import flat_topology, small_plan
from wantrain.errors import TopologyError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.scheduler.advice import FACTOR, what_would_help
from wantrain.scheduler.cost_model import predict
from wantrain.topology import Topology

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=32)
PROFILE = gpt_profile(MODEL, 2)


def two_sites(between: str, **worker: str) -> Topology:
    data = {
        "name": "t",
        "worker": [{"name": "w", "count": 2, "site": "a"} | worker, {"name": "v", "count": 2, "site": "b"} | worker],
        "link": [
            {"within": "a", "bandwidth": "1 Gbit/s"},
            {"within": "b", "bandwidth": "1 Gbit/s"},
            {"between": ["a", "b"], "bandwidth": between},
        ],
    }
    return Topology.parse(data, TopologyError, "t")


def plan_across():  # type: ignore[no-untyped-def]
    plan = small_plan(2, 2, model=MODEL, microbatch_size=2)
    rows = [replica.model_copy(update={"workers": (f"w-{i}", f"v-{i}")}) for i, replica in enumerate(plan.replicas)]
    return plan.model_copy(update={"replicas": tuple(rows)})


def test_a_split_backward_is_named_where_it_helps_and_fits() -> None:
    plan, topology = small_plan(4, 1, model=MODEL, microbatch_size=2), flat_topology(4, "10 Gbit/s", "0 ms")
    (found,) = (one for one in what_would_help(plan, topology, PROFILE) if one.what == "schedule")
    better = small_plan(4, 1, model=MODEL, microbatch_size=2, schedule="zero_bubble")
    assert found.change == "zero_bubble in place of 1f1b"
    assert found.step_s == pytest.approx(predict(better, topology, PROFILE).step_s, rel=0.01)
    assert all(one.what != "schedule" for one in what_would_help(better, topology, PROFILE))
    assert plan.prediction is not None
    scarce = min(plan.prediction.memory_bytes.values()) // 2
    workers = tuple(worker.model_copy(update={"memory_bytes": scarce}) for worker in topology.workers)
    tight = what_would_help(plan, topology.model_copy(update={"workers": workers}), PROFILE)
    assert all(one.what != "schedule" for one in tight)


def test_the_slow_link_between_sites_is_named_for_both_ends_at_once_and_its_gain_is_real() -> None:
    topology = two_sites("2 Mbit/s")
    best = next(one for one in what_would_help(plan_across(), topology, PROFILE) if one.what != "schedule")
    assert best.what in ("link a → b", "link b → a")
    assert best.change == "from 2 Mbit/s to 4 Mbit/s"
    ends = best.what.removeprefix("link ").split(" → ")
    changed = topology.with_link(*ends, bandwidth_bytes_per_s=FACTOR * 2e6 / 8)
    now_s, then_s = (predict(plan_across(), one, PROFILE).step_s for one in (topology, changed))
    assert then_s == pytest.approx(best.step_s)
    assert best.gain == pytest.approx(1 - then_s / now_s)
    assert best.gain > 0.1


def test_on_a_fast_network_only_faster_workers_help() -> None:
    advice = what_would_help(plan_across(), two_sites("100 Gbit/s", flops="1 GFLOP/s"), PROFILE)
    assert advice
    assert advice[0].what == "all workers"
    assert advice[0].gain == pytest.approx(0.5, abs=0.02)
    assert not any("link" in one.what for one in advice)


def test_a_shared_uplink_is_advised_on() -> None:
    advice = what_would_help(plan_across(), two_sites("1 Gbit/s", uplink="2 Mbit/s"), PROFILE)
    assert advice[0].what == "uplink of all workers"
    assert str(advice[0]).startswith(f"{advice[0].what} from 2 Mbit/s to 4 Mbit/s: −")
