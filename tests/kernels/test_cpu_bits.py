"""Numbers and codes in compiled loops, tried on all or many values against torch."""

import numpy as np
import pytest
import torch
from numba import njit

from wantrain_kernels import cpu_bits, reference
from wantrain_kernels.cpu_bits import bits_of, float_of, pointer


@njit
def _halves(numbers: int, count: int, form: int, out: int) -> None:
    source, target = pointer(numbers), pointer(out)
    for i in range(count):
        bits = bits_of(cpu_bits.load_f32(source, i))
        half = cpu_bits.fp16_of(bits) if form == cpu_bits.FP16 else cpu_bits.bf16_of(bits)
        cpu_bits.store_u16(target, i, half)


@njit
def _floats(halves: int, count: int, form: int, out: int) -> None:
    source, target = pointer(halves), pointer(out)
    for i in range(count):
        half = cpu_bits.load_u16(source, i)
        value = cpu_bits.of_fp16(half) if form == cpu_bits.FP16 else cpu_bits.of_bf16(half)
        cpu_bits.store_f32(target, i, value)


@njit
def _round_trip(codes: int, bits: int, out: int) -> np.uint64:
    word = cpu_bits.squeeze(pointer(codes), 0, bits)
    cpu_bits.store_u64(pointer(out), 0, cpu_bits.spread(word, bits))
    return word


@njit
def _same(bits: np.int32) -> np.int32:
    return bits_of(float_of(bits))


FORMS = [(torch.float16, cpu_bits.FP16), (torch.bfloat16, cpu_bits.BF16)]


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_every_half_becomes_the_float_that_torch_makes_of_it(dtype: torch.dtype, form: int) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    floats = torch.empty(65536)
    _floats(halves.data_ptr(), 65536, form, floats.data_ptr())
    expected = halves.view(dtype).float()
    assert torch.equal(floats.isnan(), expected.isnan())
    assert torch.equal(floats.view(torch.int32)[~floats.isnan()], expected.view(torch.int32)[~floats.isnan()])


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_floats_are_rounded_as_torch_rounds_them(dtype: torch.dtype, form: int) -> None:
    """Every half, the middle of every two, an ulp to both sides of that, and two million others."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()].unique()
    middles = ((halves[1:].double() + halves[:-1].double()) / 2).float()
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-torch.inf, torch.inf)]
    others = torch.randint(-(2**31), 2**31, (1 << 21,), generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([halves, -halves, middles, *beside, others.to(torch.int32).view(torch.float32)])
    numbers = numbers[~numbers.isnan()]
    out = torch.empty(len(numbers), dtype=torch.int16)
    _halves(numbers.data_ptr(), len(numbers), form, out.data_ptr())
    assert torch.equal(out, numbers.to(dtype).view(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_spread_undoes_squeeze_which_leaves_no_gap(bits: int) -> None:
    choose = np.random.default_rng(0)
    for _ in range(50):
        codes, out = choose.integers(0, 2**bits, 8, dtype=np.uint8), np.empty(8, np.uint8)
        word = int(_round_trip(codes.ctypes.data, bits, out.ctypes.data)) & 2**64 - 1
        assert word == sum(int(code) << i * bits for i, code in enumerate(codes))
        assert out.tolist() == codes.tolist()


def test_bits_of_undoes_float_of() -> None:
    assert [_same(np.int32(bits)) for bits in (0, 1, -(2**31), 0x7F800000)] == [0, 1, -(2**31), 0x7F800000]


def test_random_numbers_and_digests_are_those_of_the_definition() -> None:
    places = torch.arange(1000) * 4_294_967 + 2**31 - 5
    key = 0x0FED_CBA9_8765_4321
    low, high = (np.uint32(half) for half in reference.split_key(key))
    expected = reference.random32(key, places).tolist()
    shares = ((places % 65536 + 1) * reference.weight32(places) & reference.MASK32).tolist()
    for place, number, share in zip(places.tolist(), expected, shares, strict=True):
        at = np.uint32(place & reference.MASK32)
        assert int(_random(low, high, at)) == number
        assert int(_share(place % 65536, place)) == share


@njit
def _random(low: np.uint32, high: np.uint32, place: np.uint32) -> np.uint32:
    return cpu_bits.random32(low, high, place)


@njit
def _share(stored: int, place: int) -> np.uint32:
    return cpu_bits.share(stored, cpu_bits.spot_of(place))
