"""What is measured of layers: bytes exactly, seconds by laws that hold on any machine."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from wantrain.model_config import ModelConfig
from wantrain.pipeline.stage import TorchStage
from wantrain.profile import gpt_profile
from wantrain.training import layer_profiler
from wantrain.training.layer_profiler import LayerMeasurement, LayerTimes, measure_layers

MODEL = ModelConfig(num_layers=5, hidden=64, num_heads=4, seq_len=32, vocab_size=300, dropout=0.1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured() -> LayerMeasurement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_profiler, "_ENOUGH_S", 0.2)
        return measure_layers(MODEL, 4, device=CPU, source="measured on a test")


def test_bytes_are_those_that_are_counted(measured: LayerMeasurement) -> None:
    counted = gpt_profile(MODEL, 4)
    for own, expected in zip(measured.profile.layers, counted.layers, strict=True):
        assert own.name == expected.name
        assert own.parameter_bytes == expected.parameter_bytes
        assert own.activation_elements == expected.activation_elements
        assert own.stored_bytes == pytest.approx(expected.stored_bytes, rel=0.1)


def test_blocks_share_one_median_of_every_block_and_round(measured: LayerMeasurement) -> None:
    blocks = measured.profile.layers[1:-1]
    speed = measured.profile.reference_flops_per_s
    assert speed is not None
    assert len({(one.forward_flops, one.backward_flops, one.stored_bytes) for one in blocks}) == 1
    times = measured.times["block"]
    assert len(times.forward_s) == len(times.backward_s) == layer_profiler.NUM_BLOCKS * measured.num_rounds
    assert blocks[0].forward_s(speed) == pytest.approx(statistics.median(times.forward_s))


def test_gradients_of_weights_are_a_part_of_a_backward(measured: LayerMeasurement) -> None:
    embedding, *blocks, head = measured.profile.layers
    assert embedding.weight_flops < 0.5 * embedding.backward_flops  # it has no product with a weight
    for layer in (blocks[0], head):
        assert layer.weight_flops > 0.1 * layer.backward_flops


def test_the_reference_speed_gives_the_measured_seconds_back(measured: LayerMeasurement) -> None:
    profile, counted = measured.profile, gpt_profile(MODEL, 4)
    speed = profile.reference_flops_per_s
    assert speed is not None
    assert profile.compute_s(0, 7, speed) == pytest.approx(counted.compute_s(0, 7, speed))
    assert profile.compute_s(0, 7, 2 * speed) == pytest.approx(profile.compute_s(0, 7, speed) / 2)
    assert profile.layers[0].forward_flops > 0, "an embedding takes time, though it counts no operation"
    assert (profile.model, profile.source) == (MODEL, "measured on a test")


def test_the_optimizer_is_measured_too(measured: LayerMeasurement) -> None:
    assert measured.profile.optimizer_flops_per_parameter is not None
    assert measured.profile.optimizer_flops_per_parameter > 0


@pytest.mark.alone
def test_what_a_stage_takes_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that sleeps 20 ms forward is measured as one that does."""
    monkeypatch.setattr(layer_profiler, "_ENOUGH_S", 0.0)
    forward = TorchStage.forward

    def slow(stage: TorchStage, *arguments: object) -> torch.Tensor:
        time.sleep(0.02)
        return forward(stage, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchStage, "forward", slow)
    profile = measure_layers(MODEL, 1, device=CPU, source="measured").profile
    assert profile.reference_flops_per_s is not None
    assert 0.02 <= profile.layers[1].forward_s(profile.reference_flops_per_s) < 0.2


def test_a_model_of_one_block_is_measured_in_bf16() -> None:
    tiny = MODEL.model_copy(update={"num_layers": 1})
    said: list[str] = []
    measured = measure_layers(tiny, 1, device=CPU, source="measured", dtype="bf16", progress=said.append)
    assert len(measured.times["block"].forward_s) == measured.num_rounds
    assert measured.profile.layers[1].parameter_bytes == gpt_profile(tiny, 1).layers[1].parameter_bytes
    assert said[0] == "layers, round 1"


def test_spread_is_half_of_what_holds_the_middle_half() -> None:
    times = LayerTimes([0.9, 1.0, 1.0, 1.1, 1.2], [1.0] * 5)
    low, middle, high = statistics.quantiles([1.9, 2.0, 2.0, 2.1, 2.2], n=4)
    assert times.spread == pytest.approx((high - low) / 2 / middle)


def test_a_dilated_profile_rests_after_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(layer_profiler.time, "sleep", slept.append)
    measured = measure_layers(MODEL, 1, device=CPU, source="measured", dilation=3.0)
    assert len(slept) == 2 * (measured.num_rounds + 1)
    at_work_s = sum(sum(one.forward_s) + sum(one.backward_s) for one in measured.times.values())
    assert sum(slept[2:]) == pytest.approx(2 * at_work_s, rel=0.1)  # the first round's times don't count
