"""Direct quantization as a codec: what is keyed by what, and what can't be encoded."""

import pytest
import torch

from wantrain.codecs.codec import Codec, make_codec
from wantrain.errors import ChannelError, CodecError


def test_non_finite_values_are_an_error_that_says_how_many() -> None:
    tensor = torch.randn(4, 256)
    tensor[2, 200] = float("nan")
    tensor[3, 0] = float("inf")
    with pytest.raises(CodecError, match="'quantized:4' met NaN or infinity in 2 of 8 groups of 128"):
        make_codec("quantized:4").encode(tensor)


def test_saturating_counts_nan_as_zero_and_infinity_as_the_greatest() -> None:
    tensor = torch.linspace(-1, 1, 128)
    tensor[5], tensor[6] = float("nan"), float("-inf")
    name = "quantized:8,nonfinite=saturate"
    found = make_codec(name).decode(make_codec(name).encode(tensor))
    assert found[5] == 0
    assert found[6] == pytest.approx(-1.0, abs=0.01)


def test_random_rounding_follows_the_step_and_the_samples_not_the_payload() -> None:
    name, tensor = "quantized:2,rounding=stochastic", torch.randn(1, 8, 64)

    def body(step: int, sample: int, num_before: int) -> torch.Tensor:
        codec = make_codec(name, seed=1)
        for _ in range(num_before):
            codec.encode(tensor, [0])
        codec.moment = step
        return codec.encode(tensor, [sample])[64:]

    assert torch.equal(body(3, 7, 0), body(3, 7, 2))
    assert not torch.equal(body(3, 7, 0), body(4, 7, 0))
    assert not torch.equal(body(3, 7, 0), body(3, 8, 0))


def test_the_rotation_is_the_same_at_both_ends_and_another_for_another_seed() -> None:
    tensor = torch.zeros(2, 128)
    tensor[:, 3:8] = 100.0
    there, here, stranger = (make_codec("hadamard:8", seed=seed) for seed in (5, 5, 6))
    payload = there.encode(tensor, [1, 2])
    torch.testing.assert_close(here.decode(payload.clone(), [1, 2]), tensor, atol=3, rtol=0)
    assert float((stranger.decode(payload, [1, 2]) - tensor).abs().max()) > 50


def test_rotated_outliers_survive_low_bits() -> None:
    tensor = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.01
    tensor[:, 5] = 1.0
    errors = {}
    for kind in ("quantized", "hadamard"):
        found = make_codec(f"{kind}:4").decode(make_codec(f"{kind}:4").encode(tensor))
        small = torch.arange(128) != 5
        errors[kind] = float((found - tensor)[:, small].norm() / tensor[:, small].norm())
    assert errors["hadamard"] < 0.8 * errors["quantized"]


def test_measure_says_what_encode_loses_and_changes_nothing() -> None:
    tensor = torch.randn(16, 256)
    for name in ("quantized:3", "quantized:4,rounding=stochastic", "hadamard:3"):
        codec, other = make_codec(name, seed=2), make_codec(name, seed=2)
        loss = codec.measure(tensor, [])
        assert loss is not None
        found = other.decode(codec.encode(tensor))
        assert float((found - tensor).norm() / tensor.norm()) == pytest.approx(loss.relative_error, rel=1e-4)
    assert make_codec("raw:bf16").measure(tensor, []) is None


def test_clipped_values_are_counted() -> None:
    tensor = torch.full((1, 128), 0.1)
    tensor[0, 0] = 10.0
    loss = make_codec("quantized:2").measure(tensor, [])
    assert loss is not None
    assert loss.clipped_share == pytest.approx(1 / 128)


def test_bits_are_raised_by_agreement_and_others_are_refused() -> None:
    sender, receiver = make_codec("quantized:4"), make_codec("quantized:4")
    sender.wanted_bits = 6
    views = sender.view([]), receiver.view([])
    receiver.agree([], views[1], views[0])
    with pytest.raises(ChannelError, match=r"another number of bits \(got 4, expected 6\)"):
        receiver.decode(sender.encode(torch.randn(64)))
    sender.agree([], *views)
    assert sender.bits == receiver.bits == 6
    tensor = torch.randn(128)
    found = make_agreed(6).decode(make_agreed(6).encode(tensor))
    torch.testing.assert_close(found, tensor, atol=float(tensor.abs().max()) / 60, rtol=0)


def test_bits_that_no_backend_has_are_refused() -> None:
    codec = make_codec("quantized:4")
    with pytest.raises(ChannelError, match="wants 7 bits"):
        codec.agree([], codec.view([]), bytes([7]))


def make_agreed(bits: int) -> Codec:
    codec = make_codec("quantized:4")
    codec.bits = bits
    return codec
