"""A rank's codecs: made as the plan says, named by the layer they come after."""

import pytest

from tests.jobs import change, small_plan
from wantrain.errors import PlanError
from wantrain.pipeline.boundary_codecs import BoundaryCodecs, CodecSettings, needs_agreement
from wantrain.plan import Plan

SETTINGS = CodecSettings(sample_shape=(8, 64), ram_bytes=1 << 20)


def three_stages(**choices: object) -> Plan:
    return small_plan(3, 2, **choices)


def test_the_message_buffers_of_a_middle_stage_share_what_the_rank_may_take() -> None:
    codecs = BoundaryCodecs(three_stages(forward_codec="aqsgd:4"), 1, SETTINGS)
    codecs.receiver(0, "forward")
    codecs.sender(1, "forward", "w-2")
    layers = {buffer.layer for buffer in codecs.buffers}
    plan = three_stages()
    assert layers == {plan.stages[0].end_layer, plan.stages[1].end_layer}
    assert [buffer.key.split("-", 2)[2] for buffer in codecs.buffers] == ["receiver-0", "sender-0"]
    codecs.close()


def test_codecs_that_remember_need_to_know_what_a_sample_looks_like() -> None:
    codecs = BoundaryCodecs(three_stages(forward_codec="aqsgd:4"), 0, CodecSettings())
    with pytest.raises(PlanError, match="say what one looks like"):
        codecs.sender(0, "forward", "w-1")


def test_raw_payloads_need_no_agreement_and_no_guard() -> None:
    plan = three_stages(max_codec_error=0.1)
    assert not needs_agreement(plan, 0, "forward")
    assert BoundaryCodecs(plan, 0, SETTINGS).sender(0, "forward", "w-1")[1] is None
    assert needs_agreement(change(plan, boundaries=_quantized(plan)), 0, "forward")


def test_wanted_bits_come_back_for_the_same_boundary_and_never_below_the_codecs_own() -> None:
    plan = three_stages(forward_codec="quantized:4", max_codec_error=0.1)
    codecs = BoundaryCodecs(plan, plan.rank_at(1, 0), SETTINGS)
    codec, _ = codecs.sender(0, "forward", "w-1")
    layer = plan.stages[0].end_layer
    assert codecs.wanted_bits() == {f"{layer}/forward/1": 4}
    for saved, wanted in (
        ({f"{layer}/forward/1": 2}, 4),
        ({f"{layer}/forward/0": 8, f"{layer}/forward/1": 6}, 6),  # this replica's own
        ({f"{layer + 1}/forward/0": 8, f"{layer}/backward/0": 8}, 6),  # of other boundaries and ways
        ({f"{layer}/forward/0": 8}, 8),  # under another plan: any replica's
    ):
        codecs.want_bits(saved)
        assert codec.wanted_bits == wanted


def _quantized(plan: Plan) -> list[dict[str, object]]:
    return [boundary.model_dump() | {"forward_codec": "quantized:4"} for boundary in plan.boundaries]
