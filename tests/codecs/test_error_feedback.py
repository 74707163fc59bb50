"""What a codec loses is owed, and paid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wantrain.codecs.codec import make_codec
from wantrain.codecs.error_feedback import ErrorFeedback
from wantrain.errors import CodecError

CODECS = [
    "raw:fp32",
    "raw:bf16",
    "quantized:2",
    "quantized:4",
    "hadamard:3",
    "quantized:8,rounding=stochastic",
    "cocktail:4",
]
STEP = 1 << 20


@pytest.fixture(params=CODECS)
def name(request: pytest.FixtureRequest) -> str:
    return f"error_feedback:{request.param}"


def gradient(seed: int, num_values: int = 1000, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CODECS), st.integers(0, 300), st.integers(0, 99), st.floats(-12, 6))
def test_what_arrives_and_what_is_owed_are_what_was_given_to_two_roundings(
    codec: str, num_values: int, seed: int, exponent: float
) -> None:
    values, residual = gradient(seed, num_values, 10**exponent), gradient(seed + 100, num_values, 10**exponent)
    due = values.double() + residual.double()
    _, arrived = ErrorFeedback(f"error_feedback:{codec}").encode_and_decode(values, residual, 7 * STEP)
    got = arrived.double() + residual.double()
    assert bool(((got - due).abs() <= 2.0**-24 * (due.abs() + residual.double().abs())).all())


def test_everything_arrives_in_the_end(name: str) -> None:
    sender, residual = ErrorFeedback(name), torch.zeros(1000)
    given_sum, arrived_sum = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for step in range(50):
        values = gradient(step)
        _, arrived = sender.encode_and_decode(values, residual, step * STEP)
        given_sum += values
        arrived_sum += arrived
    torch.testing.assert_close(arrived_sum + residual, given_sum, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("codec", "share"), [("quantized:2", 0.03), ("quantized:4", 0.005), ("cocktail:4", 0.25)])
def test_a_constant_gradient_is_served_in_full_and_without_feedback_it_is_not(codec: str, share: float) -> None:
    constant, num_steps = gradient(0), 200
    fed, bare, residual = ErrorFeedback(f"error_feedback:{codec}"), ErrorFeedback(codec), torch.zeros(1000)
    with_sum, without_sum = torch.zeros(1000), torch.zeros(1000)
    for step in range(num_steps):
        with_sum += fed.encode_and_decode(constant, residual, step * STEP)[1]
        without_sum += bare.encode_and_decode(constant, None, step * STEP)[1]
    error, plain_error = (torch.linalg.vector_norm(total / num_steps - constant) for total in (with_sum, without_sum))
    assert error <= share * torch.linalg.vector_norm(constant)
    assert plain_error >= 3 * error


def test_the_other_end_sees_what_the_sender_says_it_sees(name: str) -> None:
    sender, receiver, residual = ErrorFeedback(name, stream=1), make_codec(name, stream=1), torch.zeros(300)
    for step in range(3):
        payload, seen = sender.encode_and_decode(gradient(step, 300), residual, step * STEP)
        seen, receiver.moment = seen.clone(), step * STEP
        assert torch.equal(receiver.decode(payload), seen)


def test_a_new_process_with_the_old_residual_sends_the_same_bytes(name: str) -> None:
    first, residual = ErrorFeedback(name), torch.zeros(300)
    for step in range(3):
        first.encode(gradient(step, 300), residual, step * STEP)
    other, copied = ErrorFeedback(name), residual.clone()
    bodies = [one.encode(gradient(3, 300), owed, 3 * STEP)[64:] for one, owed in ((first, residual), (other, copied))]
    assert torch.equal(*bodies)
    assert torch.equal(residual, copied)


def test_tensors_with_and_without_a_residual_may_take_turns() -> None:
    sender, receiver = ErrorFeedback("quantized:4"), make_codec("quantized:4")
    for step, residual in enumerate((None, torch.zeros(1000), None, torch.zeros(1000))):
        arrived = receiver.decode(sender.encode(gradient(step), residual, step))
        if residual is not None:
            torch.testing.assert_close(arrived + residual, gradient(step))


def test_without_a_residual_the_values_are_sent_as_they_are_and_left_alone() -> None:
    values = gradient(0)
    payload = ErrorFeedback("quantized:4").encode(values, None, 0)
    assert torch.equal(values, gradient(0))
    assert torch.equal(payload[64:], make_codec("quantized:4").encode(values)[64:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_or_forgotten(bad: float) -> None:
    values = gradient(0)
    values[500] = bad
    with pytest.raises(CodecError, match="NaN or infinity"):
        ErrorFeedback("error_feedback:quantized:4").encode(values, torch.zeros(1000), 0)
    residual = torch.zeros(1000)
    ErrorFeedback("error_feedback:quantized:4,nonfinite=saturate").encode(values, residual, 0)
    assert bool(residual.isfinite().all())
    assert residual[500] == 0
