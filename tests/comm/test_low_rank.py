"""Matrices as two factors: all that is lost is owed, and paid."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from wantrain.codecs.codec import make_codec
from wantrain.comm.low_rank import LowRank

SHAPES = ((40, 60), (60,), (8, 3, 30, 2), (3, 3))
"""A matrix, a vector, four dimensions, and a matrix too small to go as factors."""

NUM_VALUES = 2400 + 60 + 1440 + 9


def gradients(seed: int) -> Tensor:
    return torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 60, generator=generator)
    other = torch.randn(8, rank, generator=generator) @ torch.randn(rank, 180, generator=generator)
    return torch.cat([one.flatten(), torch.randn(60, generator=generator), other.flatten(), torch.ones(9)])


def through(codec: str, values: Tensor) -> Tensor:
    """Return what arrives of values."""
    return make_codec(codec).decode(make_codec(codec).encode(values))


def step(members: Sequence[LowRank], parts: Sequence[Tensor], codec: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the sum as each member sees it; both factors go through a codec once, on the way to the sum."""
    total_left = sum(
        (through(codec, one.left(part)) for one, part in zip(members, parts, strict=True)), torch.zeros(())
    )
    lefts = [total_left.clone() for _ in members]
    sent = [through(codec, one.right(left)) for one, left in zip(members, lefts, strict=True)]
    total = sum(sent, torch.zeros(()))
    outs = [torch.empty(NUM_VALUES, dtype=dtype) for _ in members]
    for one, left, own, out in zip(members, lefts, sent, outs, strict=True):
        one.finish(left, own, total, out)
    return outs


@pytest.mark.parametrize("codec", ["raw:fp32", "quantized:4", "hadamard:2"])
def test_everything_arrives_and_all_see_the_same(codec: str) -> None:
    members = [LowRank(SHAPES, rank=2) for _ in range(3)]
    arrived, given = torch.zeros(NUM_VALUES), torch.zeros(NUM_VALUES)
    for i in range(30):
        parts = [gradients(3 * i + member) for member in range(3)]
        outs = step(members, parts, codec, torch.float32)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        arrived += outs[0]
        given += sum(parts)
    owed = sum((one.owed for one in members), torch.zeros(()))
    torch.testing.assert_close(arrived + owed, given, rtol=0, atol=1e-3)
    assert float(owed.norm()) > 0.1 * float(given.norm())


def test_matrices_of_the_rank_arrive_whole_at_once() -> None:
    members = [LowRank(SHAPES, rank=2) for _ in range(2)]
    parts = [of_rank(1, seed=0), of_rank(1, seed=1)]
    (out, _) = step(members, parts, "raw:fp32", torch.float32)
    torch.testing.assert_close(out, parts[0] + parts[1], rtol=1e-4, atol=1e-4)


def test_the_same_gradients_are_found_better_from_step_to_step() -> None:
    """Subspace iteration: what comes again is soon seen as well as its best approximation of the rank."""
    values = of_rank(6, seed=0)
    matrix = values[:2400].view(40, 60)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    best = float((matrix - left[:, :2] * singular[:2] @ right[:2]).norm() / matrix.norm())
    member, errors = LowRank(SHAPES, rank=2), []
    for _ in range(8):
        (out,) = step([member], [values], "quantized:8", torch.float32)
        errors.append(float((out[:2400].view(40, 60) - matrix).norm() / matrix.norm()))
        member.owed.zero_()
    assert errors[0] > 1.1 * best
    assert errors[-1] < 1.05 * best


def test_what_members_differ_in_does_not_pile_up() -> None:
    """Members whose gradients cancel owe a few steps' of them, not 80 steps'."""
    members = [LowRank(SHAPES, rank=8) for _ in range(2)]
    own = of_rank(4, seed=0)
    for i in range(80):
        noise = 0.01 * gradients(i)
        step(members, [own + noise, noise - own], "quantized:8", torch.float32)
    assert all(float(one.owed.norm()) < 12 * float(own.norm()) for one in members)


def test_sums_are_written_in_the_gradients_own_type() -> None:
    members = [LowRank(SHAPES, rank=2) for _ in range(2)]
    parts = [of_rank(1, seed=0).bfloat16(), of_rank(1, seed=1).bfloat16()]
    (out, _) = step(members, parts, "raw:fp32", torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (parts[0] + parts[1]).bfloat16(), rtol=0.05, atol=0.05)


def test_what_is_no_matrix_or_too_small_a_one_travels_whole() -> None:
    low_rank = LowRank(SHAPES, rank=2)
    values = gradients(0)
    lefts = low_rank.left(values)
    assert lefts.numel() == 2 * (40 + 8)
    rights = low_rank.right(lefts)
    assert rights.numel() == 2 * (60 + 180) + 60 + 9
    assert torch.equal(rights[-69:-9], values[2400:2460])
    assert torch.equal(rights[-9:], values[-9:])


def test_nothing_to_factor_is_all_whole() -> None:
    low_rank, values, out = LowRank([(5,), (2, 2)], rank=4), torch.arange(9.0), torch.empty(9)
    lefts = low_rank.left(values)
    rights = low_rank.right(lefts)
    low_rank.finish(lefts, rights, rights, out)
    assert lefts.numel() == 0
    assert torch.equal(out, values)
