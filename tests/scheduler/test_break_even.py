"""The break-even rate is where both steps are equal, and grows with the speed of the codec."""

import math

import pytest

from tests.jobs import flat_topology, small_plan
from wantrain.errors import PlanError, TopologyError
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.scheduler.break_even import break_even_bytes_per_s
from wantrain.scheduler.cost_model import predict
from wantrain.topology import Topology

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=32)
PROFILE = gpt_profile(MODEL, 2)
PLAN = small_plan(2, 1, model=MODEL, microbatch_size=2, forward_codec="quantized:4", backward_codec="quantized:4")
RAW = small_plan(2, 1, model=MODEL, microbatch_size=2)


def topology(speed: float, rate: str = "1 Gbit/s") -> Topology:
    flat = flat_topology(2, rate)
    workers = tuple(worker.model_copy(update={"codec_values_per_s": speed}) for worker in flat.workers)
    return flat.model_copy(update={"workers": workers})


@pytest.mark.parametrize("speed", [1e6, 1e7, 1e8])
def test_below_the_rate_the_codec_shortens_the_step_and_above_it_does_not(speed: float) -> None:
    rate = break_even_bytes_per_s(PLAN, topology(speed), PROFILE)
    assert 0 < rate < math.inf
    for factor, pays in ((0.8, True), (1.25, False)):
        there = topology(speed, f"{factor * rate * 8} bit/s")
        assert (predict(PLAN, there, PROFILE).step_s < predict(RAW, there, PROFILE).step_s) is pays


def test_a_faster_codec_pays_on_faster_links() -> None:
    slow, fast = (break_even_bytes_per_s(PLAN, topology(speed), PROFILE) for speed in (1e6, 1e8))
    assert fast > 10 * slow


def test_what_can_not_be_weighed_is_refused() -> None:
    with pytest.raises(TopologyError, match="how fast worker 'w-0' encodes is not known"):
        break_even_bytes_per_s(PLAN, flat_topology(2), PROFILE)
    with pytest.raises(PlanError, match="all raw:fp32"):
        break_even_bytes_per_s(RAW, topology(1e6), PROFILE)
