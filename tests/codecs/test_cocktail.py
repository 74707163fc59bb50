"""Few values, each in its turn."""

import pytest
import torch
from torch import Tensor

from wantrain import wire
from wantrain.codecs.codec import Codec, make_codec
from wantrain.errors import CodecError

STEP = 1 << 20


def arrived(codec: str, values: Tensor, moment: int, stream: int = 0) -> Tensor:
    sender, receiver = make_codec(codec, stream), make_codec(codec, stream)
    sender.moment = receiver.moment = moment
    return receiver.decode(sender.encode(values))


def masked(num_values: int, moment: int, codec: str = "cocktail:8,top=1", stream: int = 0) -> Tensor:
    """Return the places that a codec looks at."""
    return arrived(codec, torch.ones(num_values), moment, stream).nonzero().flatten()


@pytest.mark.parametrize(
    ("name", "times_fewer"), [("cocktail:4", 174), ("cocktail:4,mask=0.2", 87), ("cocktail:2,mask=0.167,top=1", 90)]
)
def test_bytes_against_fp32(name: str, times_fewer: int) -> None:
    values = torch.randn(1_000_000)
    payload = make_codec(name).encode(values)
    assert payload.numel() == wire.payload_bytes(name, (1_000_000,))
    assert 4 * values.numel() / payload.numel() >= times_fewer


@pytest.mark.parametrize("num_values", [0, 1, 9, 10, 11, 63, 1000, 12_345])
def test_what_arrives_is_near_the_greatest_of_the_masked_and_else_zero(num_values: int) -> None:
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(num_values))
    got = arrived("cocktail:8", values, 3 * STEP)
    kept, looked_at = got.nonzero().flatten(), masked(num_values, 3 * STEP)
    assert kept.numel() == -(-looked_at.numel() // 5)
    assert set(kept.tolist()) <= set(looked_at.tolist())
    torch.testing.assert_close(got[kept], values[kept], rtol=0.02, atol=0.02)
    passed_over = values.clone()
    passed_over[kept] = 0
    if kept.numel():
        assert passed_over[looked_at].abs().max() <= values[kept].abs().min()


@pytest.mark.parametrize(("name", "stride"), [("cocktail:8,top=1", 10), ("cocktail:8,top=1,mask=0.34", 3)])
def test_every_value_has_its_turn_once_in_a_round(name: str, stride: int) -> None:
    looked_at = torch.cat([masked(stride * 50, step * STEP + 5, name) for step in range(7, 7 + stride)])
    assert sorted(looked_at.tolist()) == list(range(stride * 50))


def test_the_mask_is_one_of_each_ten_and_no_pattern() -> None:
    places = masked(10_000, 4 * STEP)
    assert torch.equal(places // 10, torch.arange(1000))
    counts = torch.bincount(places % 10, minlength=10)
    assert 60 < counts.min() <= counts.max() < 140


def test_both_ways_and_all_members_mask_alike_and_tensors_of_a_step_do_not() -> None:
    assert torch.equal(masked(1000, 4 * STEP, stream=0), masked(1000, 4 * STEP, stream=1))
    assert not torch.equal(masked(1000, 4 * STEP), masked(1000, 4 * STEP + 1))


def test_without_a_moment_payloads_count() -> None:
    sender, receiver = make_codec("cocktail:4"), make_codec("cocktail:4")
    first, second = (receiver.decode(sender.encode(torch.ones(1000))) for _ in range(2))
    assert not torch.equal(first, second)


def test_shape_and_dtype_come_back() -> None:
    got = arrived("cocktail:4", torch.randn(3, 50).bfloat16(), 0)
    assert (got.shape, got.dtype) == ((3, 50), torch.bfloat16)


def test_stochastic_rounding_is_fair_on_average() -> None:
    values = torch.linspace(-1, 1, 1000)
    mean = torch.stack(
        [arrived("cocktail:3,mask=1,top=1,rounding=stochastic", values, step * STEP) for step in range(400)]
    ).mean(dim=0)
    assert (mean - values).abs().max() < 0.1
    assert (mean - values).mean().abs() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is_or_saturates(bad: float) -> None:
    codec: Codec = make_codec("cocktail:4")
    for place in range(0, 100, 7):
        values = torch.ones(100)
        values[place] = bad
        with pytest.raises(CodecError, match="'cocktail' met NaN or infinity in 1 of 100 values"):
            codec.encode(values)
        assert bool(arrived("cocktail:4,nonfinite=saturate", values, 0).isfinite().all())
