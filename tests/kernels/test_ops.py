"""The operations as custom operators of torch: schemas and fakes hold, compiled code keeps them, misuse is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wantrain_kernels import base_bytes, layout_of, num_nonfinite_groups, ops

SHAPE = (3, 130)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
BODY = ops.quantize(X, 4, 64, backend="reference")
ROTATED = ops.hadamard_quantize(X, 4, 64, 7, backend="reference")
CODEC = (4, 64)
LATER = ("nearest", 7, False)


def base_of(base_format: str = "bf16") -> Tensor:
    base = torch.zeros(base_bytes(SHAPE, base_format, 64), dtype=torch.uint8)
    ops.base_store(X + 1, base, 64, base_format)
    return base


OPERATORS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "quantize": (ops._quantize, lambda: (X, *CODEC, *LATER, "auto")),
    "dequantize": (ops._dequantize, lambda: (BODY, SHAPE, torch.float32, *CODEC, "auto")),
    "delta_encode": (ops._delta_encode, lambda: (X, base_of(), *CODEC, "bf16", *LATER, "auto")),
    "delta_decode": (ops._delta_decode, lambda: (BODY, base_of("q8"), SHAPE, torch.bfloat16, *CODEC, "q8", "auto")),
    "base_store": (ops._base_store, lambda: (X, base_of(), 64, "bf16", "auto")),
    "base_load": (ops._base_load, lambda: (base_of("q4"), SHAPE, torch.float16, 64, "q4", "auto")),
    "hadamard_quantize": (ops._hadamard_quantize, lambda: (X, *CODEC, 7, "stochastic", False, "auto")),
    "hadamard_dequantize": (ops._hadamard_dequantize, lambda: (ROTATED, SHAPE, torch.float32, *CODEC, 7, "auto")),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_keeps_what_its_schema_and_fake_promise(name: str) -> None:
    operator, args = OPERATORS[name]
    assert set(torch.library.opcheck(operator, args()).values()) == {"SUCCESS"}


def visit(x: Tensor, base: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Send what is new in `x`, receive it, and send the sum in turns: every operation once."""
    body, sent = ops.delta_encode(x, base, 4, 64)
    y, received = ops.delta_decode(body, other, x.shape, x.dtype, 4, 64)
    turned = ops.hadamard_dequantize(ops.hadamard_quantize(y, 3, 64, 5), x.shape, x.dtype, 3, 64, 5)
    direct = ops.dequantize(ops.quantize(turned, 8, 64), x.shape, x.dtype, 8, 64)
    again = ops.base_store(direct, other, 64)
    stored, loaded = ops.base_load(other, x.shape, x.dtype, 64)
    return y, stored, sent - received, again - loaded


def test_compiled_code_keeps_the_operators_whole() -> None:
    compiled = torch.compile(visit, fullgraph=True, backend="aot_eager")
    bases = [base_of() for _ in range(4)]
    for one, other in zip(visit(X, bases[0], bases[1]), compiled(X, bases[2], bases[3]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(bases[0], bases[2])
    assert torch.equal(bases[1], bases[3])


def test_a_sender_and_a_receiver_agree() -> None:
    _, _, between_ends, of_what_was_stored = visit(X, base_of(), base_of())
    assert between_ends.item() == of_what_was_stored.item() == 0


def test_tensors_that_need_gradients_can_be_sent() -> None:
    x = X.clone().requires_grad_()
    body, _ = ops.delta_encode(x, base_of(), 4, 64)
    assert not body.requires_grad
    assert torch.equal(ops.quantize(x, 4, 64), BODY)


def test_groups_with_nan_or_infinity_are_counted() -> None:
    x = X.clone()
    x[0, 3], x[0, 5], x[2, 129] = float("nan"), float("inf"), float("-inf")
    assert num_nonfinite_groups(ops.quantize(x, 4, 64), SHAPE, 4, 64) == 2
    assert num_nonfinite_groups(ops.quantize(x, 4, 64, saturate=True), SHAPE, 4, 64) == 0


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32, 2**63 - 1])
def test_all_keys_of_63_bits_work(key: int) -> None:
    assert torch.equal(
        ops.quantize(X, 4, 64, "stochastic", key), ops.quantize(X, 4, 64, "stochastic", key, backend="reference")
    )


def test_other_keys_round_otherwise() -> None:
    bodies = [ops.quantize(X, 4, 64, "stochastic", key) for key in (0, 1, 2**32, 2**62)]
    assert all(not torch.equal(bodies[i], bodies[j]) for i in range(4) for j in range(i))


SHORT = torch.zeros(3, dtype=torch.uint8)
MISUSES: dict[str, tuple[Callable[[], object], str]] = {
    "dtype": (lambda: ops.quantize(X.double(), 4), r"can't quantize torch.float64 \(expected fp32, bf16 or fp16\)"),
    "dtype to store": (lambda: ops.base_store(X.int(), base_of(), 64), r"can't store torch.int32 \(expected fp32"),
    "dtype to return": (lambda: ops.dequantize(BODY, SHAPE, torch.int32, *CODEC), "can't return torch.int32"),
    "bits": (lambda: ops.quantize(X, 5), r"no layout for 5 bits in groups of 128 \(expected \(2, 3, 4, 6, 8\)"),
    "group": (lambda: ops.hadamard_quantize(X, 4, 100), "no layout for 4 bits in groups of 100"),
    "group to store": (lambda: ops.base_store(X, base_of(), 100), "no layout for 8 bits in groups of 100"),
    "rounding": (lambda: ops.quantize(X, 4, 64, "up"), r"no rounding 'up' .* \(expected \('nearest', 'stochastic'\)"),
    "negative key": (lambda: ops.quantize(X, 4, 64, key=-1), r"with key -1 .*0 to 2\^63−1"),
    "large key": (lambda: ops.quantize(X, 4, 64, key=2**63), r"with key 9223372036854775808 .*0 to 2\^63−1"),
    "key to turn back": (lambda: ops.hadamard_dequantize(ROTATED, SHAPE, X.dtype, 4, 64, -1), "with key -1"),
    "body": (
        lambda: ops.dequantize(SHORT, SHAPE, torch.float32, *CODEC),
        rf"the body is torch.uint8 \(3,\) \(expected contiguous uint8 \[{layout_of(SHAPE, *CODEC).body_bytes}\]\)",
    ),
    "rotated body": (lambda: ops.hadamard_dequantize(SHORT, SHAPE, torch.float32, *CODEC), "the body is"),
    "base": (lambda: ops.delta_encode(X, SHORT, *CODEC), r"the base is torch.uint8 \(3,\) \(expected .* \[780\]\)"),
    "base of floats": (lambda: ops.base_load(X, SHAPE, torch.float32), "the base is torch.float32"),
    "base with holes": (lambda: ops.base_store(X, torch.zeros(1560, dtype=torch.uint8)[::2]), "expected contiguous"),
    "base format": (lambda: ops.delta_decode(BODY, SHORT, SHAPE, X.dtype, *CODEC, "q2"), "no base format 'q2'"),
    "backend": (lambda: ops.quantize(X, 4, backend="fast"), "no backend 'fast'"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_is_named(what: str) -> None:
    call, message = MISUSES[what]
    with pytest.raises(ValueError, match=message):
        call()
