"""How much quantizing loses: what the choice of levels, clipping, scales and rounding must be worth."""

import math

import pytest
import torch
from torch import Tensor

from wantrain_kernels import ops

NUM_VALUES = 1 << 19


def gaussian(sigma: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(512, NUM_VALUES // 512, generator=generator, dtype=torch.float64) * sigma).float()


def relative_error(x: Tensor, back: Tensor) -> float:
    return float(torch.linalg.vector_norm((back - x).double()) / torch.linalg.vector_norm(x.double()))


def direct_error(x: Tensor, bits: int, group_size: int, rounding: str = "nearest") -> float:
    body = ops.quantize(x, bits, group_size, rounding, 11)
    return relative_error(x, ops.dequantize(body, x.shape, x.dtype, bits, group_size))


def rotated_error(x: Tensor, bits: int, group_size: int) -> float:
    body = ops.hadamard_quantize(x, bits, group_size, 11)
    return relative_error(x, ops.hadamard_dequantize(body, x.shape, x.dtype, bits, group_size, 11))


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize(("bits", "greatest"), [(2, 0.36), (3, 0.21), (4, 0.106), (6, 0.028), (8, 0.007)])
def test_gaussian_values_lose_little(bits: int, greatest: float, group_size: int) -> None:
    assert direct_error(gaussian(), bits, group_size) <= greatest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_lose_less_than_without_clipping_and_a_level_at_zero(bits: int) -> None:
    x = gaussian().reshape(-1, 128)
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=1, keepdim=True) / top
    plain = (x / scale).round() * scale
    assert direct_error(x, bits, 128) < 0.93 * relative_error(x, plain)


def test_small_gradients_lose_no_more_than_large_ones() -> None:
    errors = [direct_error(gaussian(10.0**-power), 8, 128) for power in range(11)]
    assert max(errors) <= 1.05 * min(errors)
    assert max(errors) <= 0.007


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    """The mean of n errors lies within a few standard errors of zero, for each value and for all of them.

    Keys are drawn at random: keys that differ in few bits give the same random numbers to other places.
    """
    x = gaussian()[:8, :256]
    keys = torch.randint(2**63 - 1, (2000,), generator=torch.Generator().manual_seed(5)).tolist()
    total = torch.zeros_like(x, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for key in keys:
        body = ops.quantize(x, bits, 64, "stochastic", key)
        error = (ops.dequantize(body, x.shape, x.dtype, bits, 64) - x).double()
        total += error
        squares += error**2
    mean = total / len(keys)
    standard_error = ((squares / len(keys) - mean**2) / len(keys)).sqrt()
    is_at_level = standard_error < 1e-9
    assert float(is_at_level.double().mean()) < 0.05
    deviations = (mean / standard_error)[~is_at_level]
    assert float(deviations.abs().max()) < 6  # of 2,048 values; one beyond by chance once in 250,000 runs
    assert abs(float(deviations.mean())) < 4.5 / math.sqrt(deviations.numel())


def test_rounding_to_nearest_loses_less_than_stochastic_rounding() -> None:
    x = gaussian()
    assert all(direct_error(x, bits, 128) < direct_error(x, bits, 128, "stochastic") for bits in (2, 3, 4, 6, 8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_rotation_helps_where_there_are_outliers(bits: int) -> None:
    x = gaussian()
    x.view(-1)[::128] *= 60
    assert rotated_error(x, bits, 128) < 0.7 * direct_error(x, bits, 128)


def test_a_rotation_costs_nothing_where_values_are_gaussian() -> None:
    x = gaussian()
    for bits in (2, 3, 4, 8):
        assert rotated_error(x, bits, 128) == pytest.approx(direct_error(x, bits, 128), rel=0.02)


@pytest.mark.parametrize("base_format", ["bf16", "fp16", "q8"])
def test_what_both_ends_hold_draws_near_to_a_sample_that_stands_still(base_format: str) -> None:
    """Every visit sends what is still missing, so that four bits come as near as the stored form can."""
    x = gaussian()[:16]
    base = torch.empty(ops.base_bytes(x.shape, base_format, 128), dtype=torch.uint8)
    ops.base_store(torch.zeros_like(x), base, 128, base_format)
    errors = []
    for _ in range(6):
        ops.delta_encode(x, base, 4, 128, base_format)
        values, _ = ops.base_load(base, x.shape, x.dtype, 128, base_format)
        errors.append(relative_error(x, values))
    floor = {"bf16": 0.002, "fp16": 0.0004, "q8": 0.008}[base_format]
    assert errors[0] <= 0.11
    assert errors[-1] <= floor
