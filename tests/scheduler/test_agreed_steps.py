"""The end of a step: who hears of whom when, and what follows for steps that follow each other."""

from __future__ import annotations

import numpy as np
import pytest

from tests.jobs import MODEL, change, flat_topology, small_plan
from wantrain.plan import Plan
from wantrain.profile import LayerProfile, ModelProfile, gpt_profile
from wantrain.scheduler.agreement import Agreement
from wantrain.scheduler.cost_model import predict
from wantrain.topology import PAYLOAD_SHARE

LATENCY_S = 0.1


def agreement(stages: int, replicas: int) -> Agreement:
    topology = flat_topology(stages * replicas, latency="100 ms")
    return Agreement(small_plan(stages, replicas), topology)


def test_each_hears_the_last_word_after_one_latency_and_its_own_at_once() -> None:
    ready_s = np.array([1.0, 0.3, 0.2])
    assert agreement(3, 1).agreed_s(ready_s).tolist() == pytest.approx([1.0, 1.1, 1.1])
    assert agreement(3, 1).agreed_s(np.array([1.0, 1.0, 0.0])).tolist() == pytest.approx([1.1, 1.1, 1.1])


@pytest.mark.parametrize(
    ("ready_s", "expected"),
    [
        ([1.0, 0.5], 1.0),  # the first stage is the last to be ready: the other has long spoken
        ([1.0, 0.95], 1.05),  # its word comes later
    ],
)
def test_a_pipelines_step_ends_when_its_first_rank_has_heard_the_others(ready_s: list[float], expected: float) -> None:
    update_s = np.array([0.01, 0.5])
    assert agreement(2, 1).period_s(np.array(ready_s), update_s) == pytest.approx(expected + 0.01)


def test_replicas_wait_for_each_others_word_once_a_step() -> None:
    assert agreement(1, 2).period_s(np.array([1.0, 1.0]), np.zeros(2)) == pytest.approx(1.1)
    assert agreement(1, 2).period_s(np.array([1.0, 0.2]), np.zeros(2)) == pytest.approx(1.0), "one that idles"


def test_a_pipeline_of_two_pays_a_latency_there_and_one_back() -> None:
    plan, profile = small_plan(2, 1), gpt_profile(MODEL, 1)
    far, near = (predict(plan, flat_topology(2, latency=latency), profile).step_s for latency in ("1 s", "0 s"))
    assert far - near == pytest.approx(2, rel=0.01), "the last word comes in between"


@pytest.mark.parametrize(("gbit_per_s", "expected_s"), [(25, 224), (1, 5600)])
def test_the_gradients_of_175_billion_parameters_take_what_is_published(gbit_per_s: int, expected_s: float) -> None:
    """Yuan et al., section 1: 175 B parameters in fp32 over so fast a link."""
    layer = LayerProfile(
        name="all", forward_flops=1.0, backward_flops=1.0, parameter_bytes=4 * 175 * 10**9, activation_elements=1,
        stored_bytes=0,
    )  # fmt: skip
    profile = ModelProfile(microbatch_size=1, layers=(layer,), optimizer_flops_per_parameter=0.0)
    plan: Plan = change(
        small_plan(1, 2),
        num_layers=1,
        bucket_bytes=10**9,
        stages=({"first_layer": 0, "end_layer": 1, "max_in_flight": 1},),
    )
    step_s = predict(plan, flat_topology(2, f"{gbit_per_s} Gbit/s", "0 s"), profile).step_s
    assert PAYLOAD_SHARE * step_s == pytest.approx(expected_s, rel=0.01)
