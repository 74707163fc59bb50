"""Every backend gives the bytes of the definition: bodies with their padding, values, digests and updated bases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import Case, all_cases, assert_same, pairwise_cases, poisoned, values_of
from wantrain_kernels import ops, reference
from wantrain_kernels.layout import BASE_FORMATS, BITS, base_bytes

KEY = 0x0123_4567_89AB_CDEF
POISON = 255
MANY = Case(4, 128, "nearest", torch.float32, "bf16", False, "normal", (24, 333), "contiguous")


def check_direct(case: Case, backend: str, device: torch.device) -> None:
    x = values_of(case)
    options = (case.bits, case.group_size, case.rounding, KEY, case.saturate)
    expected = reference.quantize(x, *options)
    values = reference.dequantize(expected, x.shape, case.dtype, case.bits, case.group_size)
    with poisoned():
        body = ops.quantize(x.to(device), *options, backend=backend)
        back = ops.dequantize(expected.to(device), x.shape, case.dtype, case.bits, case.group_size, backend=backend)
    assert_same(expected, body, "quantize")
    assert_same(values, back, "dequantize")


def check_hadamard(case: Case, backend: str, device: torch.device) -> None:
    x = values_of(case)
    options = (case.bits, case.group_size, KEY, case.rounding, case.saturate)
    expected = reference.hadamard_quantize(x, *options)
    values = reference.hadamard_dequantize(expected, x.shape, case.dtype, case.bits, case.group_size, KEY)
    with poisoned():
        body = ops.hadamard_quantize(x.to(device), *options, backend=backend)
        back = ops.hadamard_dequantize(
            expected.to(device), x.shape, case.dtype, case.bits, case.group_size, KEY, backend=backend
        )
    assert_same(expected, body, "hadamard_quantize")
    assert_same(values, back, "hadamard_dequantize")


def check_base(case: Case, backend: str, device: torch.device) -> None:
    x = values_of(case).nan_to_num()
    expected = first_message(x, case)
    base = torch.full_like(expected, POISON, device=device)
    options = (case.group_size, case.base_format)
    stored = reference.base_store(x, expected, *options)
    values, loaded = reference.base_load(expected, x.shape, case.dtype, *options)
    with poisoned():
        digest = ops.base_store(x.to(device), base, *options, backend=backend)
        back, again = ops.base_load(base, x.shape, case.dtype, *options, backend=backend)
    assert_same(expected, base, "base_store: base")
    assert_same(stored, digest, "base_store: digest")
    assert_same(values, back, "base_load")
    assert_same(loaded, again, "base_load: digest")
    assert_same(stored, loaded, "the digest of what was stored")


def check_delta(case: Case, backend: str, device: torch.device) -> None:
    x = values_of(case)
    expected = first_message(values_of(case, seed=1).nan_to_num(), case)
    base = expected.to(device, copy=True)
    options = (case.bits, case.group_size, case.base_format, case.rounding, KEY, case.saturate)
    body, digest = reference.delta_encode(x, expected, *options)
    with poisoned():
        sent, sent_digest = ops.delta_encode(x.to(device), base, *options, backend=backend)
    assert_same(body, sent, "delta_encode")
    assert_same(digest, sent_digest, "delta_encode: digest")
    assert_same(expected, base, "delta_encode: base")


def check_decode(case: Case, backend: str, device: torch.device) -> None:
    x = values_of(case)
    expected = first_message(values_of(case, seed=1).nan_to_num(), case)
    base = expected.to(device, copy=True)
    body = reference.quantize(x, case.bits, case.group_size, case.rounding, KEY, case.saturate)
    options = (x.shape, case.dtype, case.bits, case.group_size, case.base_format)
    y, digest = reference.delta_decode(body, expected, *options)
    with poisoned():
        got, got_digest = ops.delta_decode(body.to(device), base, *options, backend=backend)
    assert_same(y, got, "delta_decode")
    assert_same(digest, got_digest, "delta_decode: digest")
    assert_same(expected, base, "delta_decode: base")


def first_message(x: Tensor, case: Case) -> Tensor:
    """Return a base that holds `x`."""
    base = torch.full((base_bytes(x.shape, case.base_format, case.group_size),), POISON, dtype=torch.uint8)
    reference.base_store(x, base, case.group_size, case.base_format)
    return base


CHECKS = (check_direct, check_hadamard, check_base, check_delta, check_decode)


def sampled() -> list[tuple[str, Case]]:
    """Return pairs of backend and case; the interpreter, a thousand times slower than a GPU, gets one case in six."""
    cases = pairwise_cases()
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    steps = {"cpu": 1, "triton": 6 if is_interpreted else 1, "cuda": 1 if torch.cuda.is_available() else len(cases)}
    return [(name, case) for name, step in steps.items() for case in cases[::step]]


@pytest.mark.parametrize(("backend", "case"), sampled(), ids=str, indirect=["backend"])
def test_operations_give_the_bytes_of_the_definition(case: Case, backend: str, device: torch.device) -> None:
    for check in CHECKS:
        check(case, backend, device)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", CHECKS)
def test_all_combinations_give_the_bytes_of_the_definition(
    check: Callable[[Case, str, torch.device], None], backend: str, device: torch.device
) -> None:
    is_interpreted = backend == "triton" and device.type == "cpu"
    for case in pairwise_cases() if is_interpreted else all_cases():
        check(case, backend, device)


@pytest.mark.parametrize("check", CHECKS)
def test_large_tensors_give_the_bytes_of_the_definition(
    check: Callable[[Case, str, torch.device], None], backend: str, device: torch.device
) -> None:
    check(MANY, backend, device)


def test_poison_fills_what_nobody_wrote() -> None:
    with poisoned():
        assert torch.empty(3, dtype=torch.uint8).tolist() == [POISON] * 3
        assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("bits", BITS)
def test_bodies_may_begin_at_any_address(bits: int, backend: str, device: torch.device) -> None:
    x = torch.randn(3, 200)
    body = reference.quantize(x, bits, 64)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), body]).to(device)[1:]
    assert_same(
        reference.dequantize(body, x.shape, torch.float32, bits, 64),
        ops.dequantize(shifted, x.shape, torch.float32, bits, 64, backend=backend),
        "dequantize",
    )


@pytest.mark.parametrize("base_format", ["q8", "q4"])
def test_stored_codes_may_begin_at_any_address(base_format: str, backend: str, device: torch.device) -> None:
    x, m = torch.randn(3, 200), torch.randn(3, 200)
    expected = torch.empty(base_bytes(x.shape, base_format, 64), dtype=torch.uint8)
    reference.base_store(m, expected, 64, base_format)
    base = torch.cat([torch.zeros(1, dtype=torch.uint8), expected]).to(device)[1:]
    body, digest = reference.delta_encode(x, expected, 4, 64, base_format)
    sent, sent_digest = ops.delta_encode(x.to(device), base, 4, 64, base_format, backend=backend)
    assert_same(body, sent, "body")
    assert_same(digest, sent_digest, "digest")
    assert_same(expected, base, "base")


@pytest.mark.parametrize("base_format", BASE_FORMATS)
def test_a_sender_and_a_receiver_of_other_kinds_keep_the_same_message(
    base_format: str, backend: str, device: torch.device
) -> None:
    shape, generator = (4, 150), torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    theirs = torch.empty(base_bytes(shape, base_format, 64), dtype=torch.uint8)
    reference.base_store(x, theirs, 64, base_format)
    ours = theirs.to(device, copy=True)
    for visit in range(12):
        x = x + 0.1 * torch.randn(shape, generator=generator)
        body, digest = ops.delta_encode(x.to(device), ours, 3, 64, base_format, "stochastic", visit, backend=backend)
        _, their_digest = reference.delta_decode(body.cpu(), theirs, shape, torch.float32, 3, 64, base_format)
        assert_same(their_digest, digest, f"digest of visit {visit}")
    assert_same(theirs, ours, "message")


@contextmanager
def flushed_to_zero() -> Iterator[None]:
    """Let this thread's processor take subnormal numbers for zero, as `torch.set_flush_denormal` does in training."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("data", ["tiny", "near least", "subnormal", "normal"])
def test_flushing_subnormal_numbers_to_zero_changes_nothing(name: str, data: str) -> None:
    for case in pairwise_cases()[::8]:
        x = values_of(Case(**(vars(case) | {"data": data, "shape": (3, 170)})))
        outcome = outcome_of(x, case, name)
        with flushed_to_zero():
            flushed = outcome_of(x, case, name)
        for what, expected in outcome.items():
            assert_same(expected, flushed[what], f"{what} of {case}")


def outcome_of(x: Tensor, case: Case, name: str) -> dict[str, Tensor]:
    """Return all that a sender and a receiver compute of `x`."""
    base = torch.empty(base_bytes(x.shape, case.base_format, case.group_size), dtype=torch.uint8)
    stored = ops.base_store(x.flip(0), base, case.group_size, case.base_format, backend=name)
    other = base.clone()
    options = (case.bits, case.group_size, case.base_format)
    body, sent = ops.delta_encode(x, base, *options, case.rounding, KEY, backend=name)
    y, received = ops.delta_decode(body, other, x.shape, x.dtype, *options, backend=name)
    rotated = ops.hadamard_quantize(x, case.bits, case.group_size, KEY, case.rounding, backend=name)
    back = ops.hadamard_dequantize(rotated, x.shape, x.dtype, case.bits, case.group_size, KEY, backend=name)
    return {"stored": stored, "body": body, "sent": sent, "y": y, "received": received, "base": base, "m": other} | {
        "rotated": rotated, "back": back
    }  # fmt: skip


def test_threads_do_not_disturb_one_another() -> None:
    tensors = [torch.randn(8, 400, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [reference.quantize(x, 3, 64) for x in tensors]
    with ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda x: ops.quantize(x, 3, 64, backend="cpu"), tensors))
    for one, other in zip(expected, bodies, strict=True):
        assert_same(one, other, "quantize")
