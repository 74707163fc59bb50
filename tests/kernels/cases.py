"""What every backend is tried on: data that break kernels, ways to lie in memory, and samples of all combinations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wantrain_kernels import reference
from wantrain_kernels.layout import BASE_FORMATS, BITS, GROUP_SIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")
SHAPES = ((1,), (63,), (64,), (1, 129), (3, 127), (2, 256), (4, 31), (2, 3, 65), (5, 1), (2, 300), (0,), (3, 0), ())
MEMORY = ("contiguous", "transposed", "every second")


@dataclass(frozen=True)
class Case:
    """One combination of everything that an operation can be asked for."""

    bits: int
    group_size: int
    rounding: str
    dtype: torch.dtype
    base_format: str
    saturate: bool
    data: str
    shape: tuple[int, ...]
    memory: str

    def __str__(self) -> str:
        dtype, shape = str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape)) or "scalar"
        bits = f"{self.bits}bit-{self.group_size}-{self.rounding}{'-saturate' * self.saturate}"
        return f"{bits}-{dtype}-{self.base_format}-{self.data}-{shape}-{self.memory}".replace(" ", "_")


FACTORS: tuple[Sequence[Any], ...] = (BITS, GROUP_SIZES, ROUNDINGS, DTYPES, BASE_FORMATS, (False, True))


def pairwise_cases() -> list[Case]:
    """Return few cases in which every two values of two factors meet."""
    return [Case(*row) for row in pairwise((*FACTORS, tuple(DATA), SHAPES, MEMORY))]


def all_cases() -> Iterator[Case]:
    """Yield every combination of the operation's options with all data; shapes and memory take turns."""
    shapes, memory = itertools.cycle(SHAPES), itertools.cycle(MEMORY)
    for row in itertools.product(*FACTORS, tuple(DATA)):
        yield Case(*row, next(shapes), next(memory))


def pairwise(factors: Sequence[Sequence[Any]], seed: int = 0) -> list[tuple[Any, ...]]:
    """Return rows with one value of each factor, such that every pair of values of two factors is in some row."""
    choose, rows = random.Random(seed), []
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(factors)), 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    while missing:
        first = min(missing)
        trials = [_row_with(first, factors, choose) for _ in range(30)]
        best = max(trials, key=lambda row: len(missing & _pairs_of(row)))
        missing -= _pairs_of(best)
        rows.append(tuple(values[i] for values, i in zip(factors, best, strict=True)))
    return rows


def _row_with(pair: tuple[int, int, int, int], factors: Sequence[Sequence[Any]], choose: random.Random) -> list[int]:
    row = [choose.randrange(len(values)) for values in factors]
    row[pair[0]], row[pair[2]] = pair[1], pair[3]
    return row


def _pairs_of(row: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


def values_of(case: Case, seed: int = 0) -> Tensor:
    """Return the case's tensor."""
    generator = torch.Generator().manual_seed(seed)
    flat = DATA[case.data](math.prod(case.shape), case, generator)
    return in_memory(flat.reshape(case.shape).to(case.dtype), case.memory)


def in_memory(x: Tensor, memory: str) -> Tensor:
    """Return the same values, lying in memory in some other way."""
    if memory == "transposed" and x.dim() > 1:
        return x.transpose(-1, 0).contiguous().transpose(-1, 0)
    if memory == "every second" and x.dim():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


Make = Callable[[int, Case, torch.Generator], Tensor]


def _normal(sigma: float) -> Make:
    return lambda num, case, generator: torch.randn(num, generator=generator, dtype=torch.float64).mul(sigma).float()


def _outlier(num: int, case: Case, generator: torch.Generator) -> Tensor:
    values = torch.randn(num, generator=generator) * 1e-2
    values[:: case.group_size] = 300.0
    return values


def _alternating(num: int, case: Case, generator: torch.Generator) -> Tensor:
    return torch.where(torch.arange(num) % 2 == 0, 1.5, -1.5)


def _ties(nudge: float) -> Make:
    """Values between two levels of scale ¼, or one ulp from there."""

    def make(num: int, case: Case, generator: torch.Generator) -> Tensor:
        half = 0.0 if reference.is_mid_rise(case.bits) else 0.5
        steps = torch.arange(num) % (2 * reference.greatest_q(case.bits)) - reference.greatest_q(case.bits)
        values = (steps.float() + half) * 0.25
        values[:: case.group_size] = 0.25 / reference.scale_factor(case.bits, case.rounding)
        return values if nudge == 0 else torch.nextafter(values, torch.full_like(values, nudge))

    return make


def _scale_boundary(num: int, case: Case, generator: torch.Generator) -> Tensor:
    """Greatest magnitudes whose scale lies on, or an ulp or two beside, the middle of two bf16 numbers."""
    values = torch.randn(num, generator=generator) * 1e-3
    tie = torch.tensor((1 + 2.0**-8) / reference.scale_factor(case.bits, case.rounding))
    places = torch.arange(0, num, min(case.group_size, 31))
    values[places] = (tie.view(torch.int32) + torch.arange(len(places)) % 5 - 2).to(torch.int32).view(torch.float32)
    return values


def _constant(value: float) -> Make:
    return lambda num, case, generator: torch.full((num,), value)


def _near_least(num: int, case: Case, generator: torch.Generator) -> Tensor:
    """Groups whose scale is about 2^-100, below which it is zero."""
    exponents = torch.randint(-104, -92, (num,), generator=generator).double()
    return (torch.randn(num, generator=generator).double() * 2.0**exponents).float()


def _nonfinite(num: int, case: Case, generator: torch.Generator) -> Tensor:
    values = torch.randn(num, generator=generator)
    for start, bad in ((0, math.nan), (35, math.inf), (70, -math.inf), (71, math.nan)):
        values[start::140] = bad
    return values


def _all_nonfinite(num: int, case: Case, generator: torch.Generator) -> Tensor:
    return torch.tensor([math.nan, math.inf, -math.inf]).repeat(num // 3 + 1)[:num]


DATA: dict[str, Make] = {
    "normal": _normal(1.0),
    "tiny": _normal(1e-8),
    "near least": _near_least,
    "subnormal": _normal(1e-40),
    "huge": _normal(1e38),
    "outlier": _outlier,
    "alternating": _alternating,
    "ties": _ties(0.0),
    "below ties": _ties(-math.inf),
    "above ties": _ties(math.inf),
    "scale boundary": _scale_boundary,
    "constant": _constant(-3.7),
    "zeros": _constant(0.0),
    "negative zeros": _constant(-0.0),
    "greatest": _constant(3.4028234e38),
    "nonfinite": _nonfinite,
    "all nonfinite": _all_nonfinite,
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that is allocated meanwhile with NaN, or with the greatest integer, so that an unset byte shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor; of NaN only that it is one, as torch itself knows several."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(expected: Tensor, actual: Tensor, what: str) -> None:
    assert (expected.dtype, expected.shape) == (actual.dtype, actual.shape), what
    wrong = (bits_of(expected) != bits_of(actual)).nonzero().flatten().tolist()
    assert not wrong, f"{what}: {len(wrong)} bytes differ, the first at {wrong[:8]}"
