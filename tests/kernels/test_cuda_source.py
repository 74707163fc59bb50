"""The CUDA C++ kernels against the definition, byte for byte: their very source, compiled for the host.

`cuda_host/emulation.cpp` runs a warp as a loop over lanes and a grid as a loop over blocks, behind the library's own C
interface; so this tests arithmetic, indexing, dispatch and `cuda_ops` without a GPU. What it can't test is how the GPU
executes an instruction; `kernels/check_cuda.py` looks at which ones are there, and `benchmarks/gpu.sh` runs them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import wantrain_kernels
from wantrain_kernels import cuda_ops, reference
from wantrain_kernels.layout import BITS, GROUP_SIZES, base_bytes, layout_of

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")
KEY = 0x1234_5678_9ABC_DEF0

# Rows of whole groups; of whole octets, with quads of them and without; anything else; more than one turn of the grid.
SHAPES = ((4, 256), (5, 96), (3, 200), (7, 328), (1,), (63,), (3, 257), (2, 3, 31), (), (2, 0), (0, 8), (12, 1600))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Give `cuda_ops` on the emulation."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    folder = tmp_path_factory.mktemp("cuda_host")
    source = Path(__file__).parent / "cuda_host" / "emulation.cpp"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    include = ["-I", str(ROOT / "kernels" / "csrc")]
    subprocess.run([COMPILER, *flags, *include, str(source), "-o", str(folder / "_cuda.so")], check=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(wantrain_kernels, "__path__", [str(folder), *wantrain_kernels.__path__])
    patch.setattr(cuda_ops, "_stream_of", lambda device: 0)
    cuda_ops._library.cache_clear()
    yield cuda_ops
    patch.undo()
    cuda_ops._library.cache_clear()


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, sigma: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * sigma).to(dtype)


def stored(values: Tensor, group_size: int, base_format: str) -> Tensor:
    base = torch.empty(base_bytes(values.shape, base_format, group_size), dtype=torch.uint8)
    reference.base_store(values, base, group_size, base_format)
    return base


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Compare bytes; NaN equals NaN, whatever its payload."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), wanted.isnan())
        got, wanted = got.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0)
    assert torch.equal(got.contiguous().view(-1).view(torch.uint8), wanted.contiguous().view(-1).view(torch.uint8))


def check_direct(cuda: ModuleType, x: Tensor, bits: int, group: int, rounding: str, saturate: bool = False) -> None:
    body = cuda.quantize(x, bits, group, rounding, KEY, saturate)
    assert_same(body, reference.quantize(x, bits, group, rounding, KEY, saturate))
    y = cuda.dequantize(body, tuple(x.shape), x.dtype, bits, group)
    assert_same(y, reference.dequantize(body, x.shape, x.dtype, bits, group))


def check_delta(
    cuda: ModuleType, x: Tensor, m: Tensor, bits: int, group: int, base_format: str, rounding: str,
    saturate: bool = False,
) -> None:  # fmt: skip
    start = stored(m, group, base_format)
    bases = [start.clone() for _ in range(4)]
    body, digest = cuda.delta_encode(x, bases[0], bits, group, base_format, rounding, KEY, saturate)
    wanted = reference.delta_encode(x, bases[1], bits, group, base_format, rounding, KEY, saturate)
    y, decoded_digest = cuda.delta_decode(body, bases[2], tuple(x.shape), x.dtype, bits, group, base_format)
    wanted_y, _ = reference.delta_decode(body, bases[3], x.shape, x.dtype, bits, group, base_format)
    assert_same(body, wanted[0])
    assert_same(y, wanted_y)
    assert int(digest) == int(decoded_digest) == int(wanted[1])
    for base in (bases[0], bases[2], bases[3]):
        assert_same(base, bases[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_direct_bytes_are_the_references_for_all_shapes(cuda: ModuleType, bits: int, group: int) -> None:
    for index, (shape, rounding) in enumerate(itertools.product(SHAPES, ROUNDINGS)):
        check_direct(cuda, gaussian(shape, DTYPES[index % 3], index), bits, group, rounding)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("base_format", ["bf16", "fp16"])
def test_delta_bytes_are_the_references_for_all_shapes(cuda: ModuleType, bits: int, base_format: str) -> None:
    for index, (shape, rounding) in enumerate(itertools.product(SHAPES, ROUNDINGS)):
        x, group = gaussian(shape, DTYPES[index % 3], index), GROUP_SIZES[index % 4]
        check_delta(cuda, x, gaussian(shape, torch.float32, index + 100), bits, group, base_format, rounding)


def special(name: str) -> Tensor:
    """Return [6, 256] values that are hard in one way."""
    x = gaussian((6, 256), torch.float32, 7)
    if name == "ties":
        return (torch.arange(6 * 256).reshape(6, 256) % 61 - 30).float() / 4
    if name == "adversarial":
        x[0], x[1, :128], x[2, 3], x[3] = 0.0, 1e-45, 3.4e38, x[3].sign() * 2.0**-100
        x[4] *= torch.logspace(-44, 38, 256)
        x[5, ::2] = -0.0
        return x
    if name == "unknown":
        x[0, 5], x[1, 200], x[2, 0], x[3] = math.nan, math.inf, -math.inf, math.nan
        x[4, 4], x[4, 5], x[4, 6] = math.inf, -math.inf, math.nan
        return x
    return x * {"tiny": 1e-8, "huge": 1e37, "smallest": 2.0**-101, "zero": 0.0}[name]


SPECIAL = ("ties", "adversarial", "unknown", "tiny", "huge", "smallest", "zero")


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("saturate", [False, True])
def test_direct_bytes_are_the_references_for_special_values(cuda: ModuleType, name: str, saturate: bool) -> None:
    for bits, dtype, rounding in itertools.product(BITS, DTYPES, ROUNDINGS):
        check_direct(cuda, special(name).to(dtype), bits, 64, rounding, saturate)


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("saturate", [False, True])
def test_delta_bytes_are_the_references_for_special_values(cuda: ModuleType, name: str, saturate: bool) -> None:
    x = special(name)
    finite = x.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)
    bases = (torch.zeros_like(x), -finite, finite * 0.999, finite.flip(1))
    for index, (m, base_format, bits) in enumerate(itertools.product(bases, ("bf16", "fp16"), BITS)):
        dtype, rounding = DTYPES[index % 2], ROUNDINGS[index // 2 % 2]
        check_delta(cuda, x.to(dtype), m, bits, 32, base_format, rounding, saturate)


def test_values_that_cancel_leave_the_base_that_the_reference_leaves(cuda: ModuleType) -> None:
    """Almost opposite m and steps, at the scales where small results begin to count as 0."""
    for exponent, bits in itertools.product(range(-100, -84), BITS):
        x = gaussian((2, 64), torch.float32, exponent & 0xFF, 2.0**exponent)
        m = -gaussian((2, 64), torch.bfloat16, bits, 2.0**exponent).float()
        check_delta(cuda, x, m, bits, 32, "bf16", "nearest")


def test_a_short_row_of_whole_octets_takes_the_fast_path_of_gpt2_xl(cuda: ModuleType) -> None:
    x = gaussian((8, 1600), torch.bfloat16)
    check_delta(cuda, x, gaussian((8, 1600), torch.float32, 1), 4, 128, "bf16", "nearest")


@pytest.mark.parametrize("bits", BITS)
def test_tensors_at_any_address_give_the_same_bytes(cuda: ModuleType, bits: int) -> None:
    x = gaussian((4 * 256 + 1,), torch.bfloat16)[1:].view(4, 256)
    start = stored(gaussian((4, 256), torch.float32, 1), 64, "bf16")
    moved = torch.empty(start.numel() + 2, dtype=torch.uint8)[2:].copy_(start)
    wanted, digest = reference.delta_encode(x, start, bits, 64)
    body, moved_digest = cuda.delta_encode(x, moved, bits, 64, "bf16", "nearest", 0, False)
    assert_same(body, wanted)
    assert_same(moved, start)
    assert int(digest) == int(moved_digest)
    odd = torch.empty(body.numel() + 1, dtype=torch.uint8)[1:].copy_(body)
    y = cuda.dequantize(odd, (4, 256), torch.float32, bits, 64)
    assert_same(y, reference.dequantize(body, (4, 256), torch.float32, bits, 64))


def test_a_tensor_that_is_not_contiguous_gives_the_bytes_of_its_copy(cuda: ModuleType) -> None:
    x = gaussian((256, 6), torch.float32).t()
    assert not x.is_contiguous()
    check_direct(cuda, x, 4, 64, "nearest")


def test_bytes_before_the_first_code_are_zero_where_no_scale_is(cuda: ModuleType) -> None:
    x = gaussian((3, 64), torch.float32)
    body = cuda.quantize(x, 4, 64, "nearest", 0, False)
    scales_bytes = layout_of(x.shape, 4, 64).scales_bytes
    assert scales_bytes == 16
    assert not body[6:scales_bytes].any()


def test_a_base_at_an_odd_address_is_refused(cuda: ModuleType) -> None:
    base = torch.empty(129, dtype=torch.uint8)[1:]
    with pytest.raises(ValueError, match="odd address"):
        cuda.delta_encode(torch.zeros(64), base, 4, 64, "bf16", "nearest", 0, False)


def test_a_type_without_a_kernel_is_refused(cuda: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no torch\.float64"):
        cuda.quantize(torch.zeros(64, dtype=torch.float64), 4, 64, "nearest", 0, False)


@pytest.mark.parametrize("base_format", ["q8", "q4"])
def test_what_has_no_kernel_here_is_tritons(
    cuda: ModuleType, base_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "choose", lambda name, device: {"triton": reference}[name])
    x, m = gaussian((3, 100), torch.float32), gaussian((3, 100), torch.float32, 1)
    check_delta(cuda, x, m, 4, 64, base_format, "nearest")
    rotated = cuda.hadamard_quantize(x, 4, 64, KEY, "nearest", False)
    assert_same(rotated, reference.hadamard_quantize(x, 4, 64, KEY))
    y = cuda.hadamard_dequantize(rotated, (3, 100), torch.float32, 4, 64, KEY)
    assert_same(y, reference.hadamard_dequantize(rotated, (3, 100), torch.float32, 4, 64, KEY))
    base = torch.empty(base_bytes(x.shape, base_format, 64), dtype=torch.uint8)
    digest = cuda.base_store(x, base, 64, base_format)
    assert int(cuda.base_load(base, (3, 100), torch.float32, 64, base_format)[1]) == int(digest)


def test_without_the_library_the_first_call_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "find_spec", lambda name: None)
    cuda_ops._library.cache_clear()
    with pytest.raises(ImportError, match="WANTRAIN_CUDA=1"):
        cuda_ops._library()


def test_a_library_of_another_version_is_refused(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_Call", type("_Call", (ctypes.Structure,), {"_fields_": (("x", ctypes.c_void_p),)}))
    cuda._library.cache_clear()
    with pytest.raises(ImportError, match="another version"):
        cuda._library()
    cuda._library.cache_clear()
