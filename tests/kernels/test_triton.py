"""What is particular to Triton: each trap that would break equality, addresses beyond 32 bits, the digest's word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import assert_same, poisoned
from wantrain_kernels import ops, reference
from wantrain_kernels.layout import BASE_FORMATS, BITS, Layout, base_bytes

triton = pytest.importorskip("triton")
triton_ops = pytest.importorskip("wantrain_kernels.triton_ops")
triton_memory = pytest.importorskip("wantrain_kernels.triton_memory")

import triton.language as tl  # noqa: E402  (there may be no Triton)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP = 32


def assert_same_body(x: Tensor, bits: int, rounding: str = "nearest", key: int = 0) -> None:
    expected = reference.quantize(x, bits, GROUP, rounding, key)
    with poisoned():
        body = ops.quantize(x.to(DEVICE), bits, GROUP, rounding, key, backend="triton")
    assert_same(expected, body, f"{bits} bits, {rounding}")


def assert_same_base(x: Tensor, base_format: str) -> None:
    expected = torch.empty(base_bytes(x.shape, base_format, GROUP), dtype=torch.uint8)
    digest = reference.base_store(x, expected, GROUP, base_format)
    base = torch.full_like(expected, 171, device=DEVICE)
    assert_same(digest, ops.base_store(x.to(DEVICE), base, GROUP, base_format, backend="triton"), "digest")
    assert_same(expected, base, "base")


def test_bf16_is_rounded_to_nearest_even_where_the_interpreter_truncates() -> None:
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    high = torch.tensor([0x3F80, 0x3F81, 0xBFFE, 0xC000, 0x0DFF, 0x7F7E])
    x = (high[:, None] << 16 | low).to(torch.int64).flatten()
    x = torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32).view(torch.float32)
    assert_same_base(x, "bf16")


def test_values_are_returned_as_bf16_rounded_to_nearest_even() -> None:
    body = reference.quantize(torch.randn(3, 64) * 3, 8, GROUP)
    expected = reference.dequantize(body, (3, 64), torch.bfloat16, 8, GROUP)
    actual = ops.dequantize(body.to(DEVICE), (3, 64), torch.bfloat16, 8, GROUP, backend="triton")
    assert_same(expected, actual, "bf16 values")


def test_every_scale_is_divided_exactly() -> None:
    """A value on a tie would notice an approximate reciprocal: all 128 scales of one power of two, and 31 ties each."""
    scale = (torch.arange(128) + 128) / 128.0
    steps = torch.tensor([127.0, *(i + 0.5 for i in range(31))])
    assert_same_body(scale[:, None] * steps, 8)


@pytest.mark.parametrize("bits", BITS)
def test_ties_go_to_the_even_level(bits: int) -> None:
    top = reference.greatest_q(bits)
    ties = torch.arange(-top, top) + (0.0 if reference.is_mid_rise(bits) else 0.5)
    rows = torch.zeros(-(-len(ties) // 31), GROUP)
    rows[:, 0] = 1 / reference.scale_factor(bits, "nearest")
    rows[:, 1:] = torch.cat([ties, torch.zeros(rows.shape[0] * 31 - len(ties))]).reshape(-1, 31)
    assert_same_body(rows, bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_random_rounding_goes_down_also_just_below_zero(bits: int) -> None:
    """floor(v − o + u) of values around where the random number carries them over a whole number, and of tiny ones."""
    x = torch.linspace(-1.0, 1.0, 6 * GROUP).reshape(6, GROUP)
    x[1] *= 1e-30
    x[2, 1:] = -1e-39
    x[3, 1:] = -0.0
    for key in (0, 1, 2**32 - 1, 2**31, 2**63 - 1):
        assert_same_body(x, bits, "stochastic", key)


def test_products_are_not_fused_into_sums() -> None:
    """k·s times 1/s is rounded to k, and k − ½ is a tie; without that rounding it is beside the tie."""
    scale = (torch.arange(128)[:, None] + 128) / 128.0
    steps = torch.tensor([1 / reference.scale_factor(4, "nearest"), *range(-7, 8)])
    x = torch.cat([scale * steps, torch.zeros(128, GROUP - 16)], dim=1)
    inverse = 1 / scale
    separate, fused = x * inverse - 0.5, (x.double() * inverse.double() - 0.5).float()
    assert not torch.equal(separate.round(), fused.round())
    assert_same_body(x, 4)
    assert triton_ops.OPTIONS["enable_fp_fusion"] is False


@pytest.mark.parametrize("base_format", BASE_FORMATS)
def test_a_digest_wraps_at_32_bits_and_leaves_its_word_zero(base_format: str) -> None:
    x = torch.full((5, 1024), -3.0)
    for _ in range(2):
        assert_same_base(x, base_format)
    assert triton_ops._word(DEVICE).tolist() == [0]


def test_a_digest_is_made_by_several_programs_that_take_several_tiles() -> None:
    num_tiles = 5
    assert 1 < triton_ops._INTERPRETED_PROGRAMS < num_tiles
    assert_same_base(torch.randn(num_tiles, triton_ops.TILE_VALUES), "bf16")


@pytest.mark.parametrize("base_format", BASE_FORMATS)
def test_stored_messages_that_are_not_finite_in_x_are_kept(base_format: str) -> None:
    m = torch.randn(2, 48)
    x = m + 1
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    expected = torch.empty(base_bytes(m.shape, base_format, GROUP), dtype=torch.uint8)
    reference.base_store(m, expected, GROUP, base_format)
    base = expected.to(DEVICE, copy=True)
    body, digest = reference.delta_encode(x, expected, 4, GROUP, base_format)
    sent, sent_digest = ops.delta_encode(x.to(DEVICE), base, 4, GROUP, base_format, backend="triton")
    assert reference.num_nonfinite_groups(body, x.shape, 4, GROUP) == 2
    for one, other, what in ((body, sent, "body"), (digest, sent_digest, "digest"), (expected, base, "base")):
        assert_same(one, other, what)


@triton.jit
def _locate_kernel(out, tile, rows, row_length, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    place = triton_memory.locate(tile, rows, row_length, GROUP, TILE, ROWS)
    column = tl.arange(0, TILE)
    for i in tl.static_range(4):
        tl.store(out + i * TILE + column, place[i].to(tl.int64))


@pytest.mark.parametrize(
    ("rows", "row_length"),
    [(1 << 20, 1 << 16), (1 << 20, (1 << 16) + 8), (1 << 20, (1 << 16) + 3), (1, (1 << 33) + 8), (1, (1 << 33) + 1)],
)
def test_places_beyond_32_bits_are_found(rows: int, row_length: int) -> None:
    group_size = 256
    constants = triton_ops.shape_constants(Layout(rows, row_length, 4, group_size))
    tile_size, groups_per_row = constants["TILE"], -(-row_length // group_size)
    tile = rows * groups_per_row // tile_size - 3
    out = torch.empty(4, tile_size, dtype=torch.int64, device=DEVICE)
    _locate_kernel[(1,)](out, tile, rows, row_length, **constants)
    for i, (group, octet, begin, room) in enumerate(out.T.tolist()):
        row, column = divmod(tile * tile_size + i, groups_per_row)
        left = row_length - column * group_size
        assert group == tile * tile_size + i
        assert octet == row * -(-row_length // 8) + column * group_size // 8
        assert begin == row * row_length + column * group_size > 1 << 32
        assert room == left or (constants["ROWS"] == "groups" and room == group_size <= left)


@pytest.mark.parametrize(
    "layout", [lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x])[::2], lambda x: x[1:, 3:]]
)
def test_tensors_may_lie_in_memory_as_they_like(layout: Callable[[Tensor], Tensor]) -> None:
    assert_same_body(layout(torch.randn(6, 72)), 3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
def test_a_replayed_graph_makes_the_digest_again() -> None:
    x, base = torch.randn(64, 1024, device=DEVICE), torch.zeros(64 * 1024 * 2, dtype=torch.uint8, device=DEVICE)
    expected = ops.base_store(x, base, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        digest = ops.base_store(x, base, backend="triton")
    for _ in range(3):
        digest.zero_()
        graph.replay()
        assert torch.equal(digest, expected)
