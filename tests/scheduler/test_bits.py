"""Bits are given back where that costs nothing, and kept few where the wire would show."""

import pytest

from tests.jobs import flat_topology, small_plan
from wantrain.codec_spec import check_activation_codec, check_gradient_codec, parse_codec
from wantrain.model_config import ModelConfig
from wantrain.profile import gpt_profile
from wantrain.scheduler.bits import GRADIENT_LADDER, LADDERS, SAME_WITHIN, Seen, fewest_bits, give_back_bits
from wantrain.scheduler.cost_model import predict

MODEL = ModelConfig(num_layers=4, hidden=64, num_heads=4, seq_len=32)
PROFILE = gpt_profile(MODEL, 2)


def chosen(rate: str, seen: Seen):  # type: ignore[no-untyped-def]
    topology = flat_topology(4, rate)
    plan = small_plan(2, 2, model=MODEL, microbatch_size=2, **fewest_bits(seen))
    return plan, give_back_bits(plan, topology, PROFILE, seen), topology


@pytest.mark.parametrize("seen", ["once", "again"])
def test_a_fast_network_carries_everything_as_it_is(seen: Seen) -> None:
    _, plan, _ = chosen("1000 Gbit/s", seen)
    assert plan.codecs == {"raw:fp32"}


def test_a_slow_network_keeps_the_fewest_bits_and_the_step_stays_as_short() -> None:
    before, plan, topology = chosen("1 Mbit/s", "once")
    assert plan.boundaries[0].forward_codec == LADDERS["once", "forward"][0]
    allowed_s = predict(before, topology, PROFILE).step_s * SAME_WITHIN
    assert plan.prediction.step_s <= allowed_s


def test_a_codec_with_memory_counts_for_nothing_where_data_is_seen_once() -> None:
    assert not any(parse_codec(name).remembers for name in LADDERS["once", "forward"])
    assert parse_codec(fewest_bits("again")["forward_codec"]).remembers


def test_every_ladder_climbs_and_names_codecs_that_can_do_the_work() -> None:
    for (_, way), ladder in LADDERS.items():
        assert [check_activation_codec(name, is_forward=way == "forward") for name in ladder]
        bits = [parse_codec(name).bits for name in ladder]
        assert bits == sorted(set(bits))
    assert [check_gradient_codec(name) for name in GRADIENT_LADDER]
