"""What every kernel computes, in plain PyTorch: the definition that faster ones must match byte for byte.

**Quantization.** Values x of a group share one scale s; value x becomes a whole number q and comes back as (q + o)·s:

    levels       2, 3, 4 bits: mid-rise, o = ½, q = −2^(b−1) … 2^(b−1)−1         ┄ −1.5s  −0.5s   0.5s   1.5s ┄
                 6, 8 bits:    mid-tread, o = 0, |q| ≤ 2^(b−1)−1                 ┄    −s      0      s        ┄
    scale        s = bf16(K · max|x|),  K = clip / top,  top = the greatest level
    nearest      q = clamp(rint(v − o)),            v = x · (1/s)
    stochastic   q = clamp(floor((v − o) + u)),     u in (0, 1) from (key, place of the value)

With few bits mid-rise wastes no level and clipping the rare largest value buys finer steps for all others. Chosen by
measured relative error on Gaussian data in groups of 64 and 128 (`tests/kernels/test_quality.py`); unclipped mid-tread,
the common choice, in brackets:

    2 bits 0.347, 0.349 (0.50, 0.54)      3 bits 0.188, 0.193 (0.24, 0.26)      4 bits 0.097, 0.102 (0.105, 0.115)

Stochastic rounding is not clipped, so that it is unbiased.

**Why all backends agree.** The maximum is taken over integers (the bits of |x|), so no order matters. One correctly
rounded division per group, then only single multiplications, additions and roundings, never fused. A scale has 8
significant bits and q + o at most 8, so (q + o)·s is exact in fp32: fusing it into an addition would change nothing.
Scales lie in {0} ∪ [2^-100, 2^125]: 1/s and every product are normal numbers, so flushing small ones to zero changes
nothing either. The random u needs 24 bits, so sums with it don't round a value across a whole number.

**Deltas** (AQ-SGD: Wang et al., "Fine-tuning Language Models over Slow Networks using Activation Compression with
Guarantees", NeurIPS 2022, algorithm 1). Both ends keep the last message m of a sample; what is sent is Q(x − m):

    y = m + (q + o)·s,    m′ = y as it is stored: bf16, fp16, or again as codes (q8, q4)

**Digest** of a stored message: Σ (h_i + 1)·w_i mod 2^32, h_i the stored 16 bits or the code of value i, w_i an odd
pseudo-random weight; one changed value always shows, and a sum has no order, so that the pass that writes m′ makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain_kernels.layout import BASE_BITS, OCTET, Layout, base_bytes, layout_of

MASK32 = 0xFFFFFFFF
NAN_SCALE = 0x7FC0
LEAST = 2.0**-100
MOST_SCALE = 2.0**125
GREATEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "q8": 3.3895313892515355e38, "q4": 3.3895313892515355e38}
"""The greatest magnitude that a stored message holds."""

_CLIP = {2: 0.56, 3: 0.78, 4: 0.90, 6: 1.0, 8: 1.0}


def is_mid_rise(bits: int) -> bool:
    """Say whether zero lies between two levels."""
    return bits <= 4


def offset(bits: int) -> float:
    """Return o."""
    return 0.5 if is_mid_rise(bits) else 0.0


def bias(bits: int) -> int:
    """Return what is added to q to store it as an unsigned code."""
    return (1 << bits - 1) - (0 if is_mid_rise(bits) else 1)


def greatest_q(bits: int) -> int:
    """Return the greatest q; the least is `-bias(bits)`."""
    return (1 << bits - 1) - 1


def scale_factor(bits: int, rounding: str) -> float:
    """Return K, an fp32 number."""
    clip = _CLIP[bits] if rounding == "nearest" else 1.0
    return torch.tensor(clip / (greatest_q(bits) + offset(bits)), dtype=torch.float32).item()


def split_key(key: int) -> tuple[int, int]:
    """Return the two 32-bit halves of a key."""
    return key & MASK32, key >> 32 & MASK32


def mix32(number: Tensor) -> Tensor:
    """Mix 32-bit numbers (int64); constants and shifts are those of C. Wellons' "lowbias32", improved."""
    number = number & MASK32
    number = ((number ^ number >> 16) * 0x21F0AAAD) & MASK32
    number = ((number ^ number >> 15) * 0xD35A2D97) & MASK32
    return number ^ number >> 15


def random32(key: int, places: Tensor) -> Tensor:
    """Return a pseudo-random 32-bit number for each place (int64)."""
    low, high = split_key(key)
    return mix32(mix32(places ^ low) + high)


def weight32(places: Tensor) -> Tensor:
    """Return the digest's weight of each place: odd."""
    number = (places * 0x9E3779B1) & MASK32
    number = ((number ^ number >> 15) * 0x85EBCA77) & MASK32
    return number | 1


def quantize(
    x: Tensor, bits: int, group_size: int = 128, rounding: str = "nearest", key: int = 0, saturate: bool = False
) -> Tensor:
    """Return the body of `x`."""
    layout = layout_of(x.shape, bits, group_size)
    groups = _to_groups(x.detach().float(), layout)
    return _write_body(*_quantize_groups(groups, layout, rounding, key, saturate), layout)


def dequantize(body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128) -> Tensor:
    """Return the values of a body; a group whose scale is NaN is NaN."""
    layout = layout_of(shape, bits, group_size)
    return _from_groups(_read_values(body, layout), layout).to(dtype).reshape(tuple(shape))


def delta_encode(
    x: Tensor, base: Tensor, bits: int, group_size: int = 128, base_format: str = "bf16", rounding: str = "nearest",
    key: int = 0, saturate: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the body of x − m and the digest of m′, which takes the place of m in `base`."""
    layout = layout_of(x.shape, bits, group_size)
    delta = x.detach().float() - _load(base, x.shape, base_format, group_size)
    codes, scales = _quantize_groups(_to_groups(delta, layout), layout, rounding, key, saturate)
    body = _write_body(codes, scales, layout)
    _, digest = delta_decode(body, base, x.shape, torch.float32, bits, group_size, base_format)
    return body, digest


def delta_decode(
    body: Tensor, base: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128,
    base_format: str = "bf16",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the digest of m′, which takes the place of m in `base`."""
    layout = layout_of(shape, bits, group_size)
    m = _load(base, shape, base_format, group_size)
    y = m + _from_groups(_read_values(body, layout), layout).reshape(tuple(shape))
    digest = base_store(torch.where(y.isnan(), m, y), base, group_size, base_format)
    return y.to(dtype), digest


def base_store(x: Tensor, base: Tensor, group_size: int = 128, base_format: str = "bf16") -> Tensor:
    """Store finite values as a message in `base`; return its digest."""
    greatest = GREATEST[base_format]
    values = x.detach().float().clamp(-greatest, greatest)
    if base_format in BASE_BITS:
        base.copy_(quantize(values, BASE_BITS[base_format], group_size))
    else:
        values = torch.where(values.abs() < LEAST, torch.zeros_like(values), values)
        base.view(_half(base_format)).copy_(values.reshape(-1))
    return _digest(base, tuple(x.shape), group_size, base_format)


def base_load(
    base: Tensor, shape: Sequence[int], dtype: torch.dtype, group_size: int = 128, base_format: str = "bf16"
) -> tuple[Tensor, Tensor]:
    """Return the values of a stored message, and its digest."""
    return _load(base, shape, base_format, group_size).to(dtype), _digest(base, shape, group_size, base_format)


def hadamard_quantize(
    x: Tensor, bits: int, group_size: int = 128, key: int = 0, rounding: str = "nearest", saturate: bool = False
) -> Tensor:
    """Return the body of the values, every whole group rotated first.

    A rotation spreads a group's largest value over all of it: what is quantized is near to Gaussian whatever came in.
    """
    layout = layout_of(x.shape, bits, group_size)
    groups = _to_groups(x.detach().float(), layout)
    if saturate:
        groups = _saturated(groups)
    signs = _signs(key, group_size, x.device)
    rotated = torch.where(_whole(layout, x.device), _walsh_hadamard(groups * signs), groups)
    rotated = torch.where(groups.isfinite().all(dim=1, keepdim=True), rotated, float("nan"))
    return _write_body(*_quantize_groups(rotated, layout, rounding, key, saturate), layout)


def hadamard_dequantize(
    body: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group_size: int = 128, key: int = 0
) -> Tensor:
    """Return the values of a body of rotated groups."""
    layout = layout_of(shape, bits, group_size)
    groups = _read_values(body, layout)
    signs = _signs(key, group_size, body.device)
    turned = torch.where(_whole(layout, body.device), _walsh_hadamard(groups) * signs, groups)
    return _from_groups(turned, layout).to(dtype).reshape(tuple(shape))


def num_nonfinite_groups(body: Tensor, shape: Sequence[int], bits: int, group_size: int = 128) -> int:
    """Return how many groups held NaN or infinity when the body was made."""
    return int((_scale_bits(body, layout_of(shape, bits, group_size)) == NAN_SCALE).sum())


def measure(
    x: Tensor, bits: int, group_size: int = 128, rounding: str = "nearest", key: int = 0
) -> tuple[float, float]:
    """Return the norm of what quantizing finite `x` loses, and the share of its values that are clipped.

    A value is clipped where it comes back further off than one step, stochastic rounding's greatest error, or half of
    one where it is rounded to nearest.
    """
    layout = layout_of(x.shape, bits, group_size)
    if not layout.num_values:
        return 0.0, 0.0
    groups = _to_groups(x.detach().float(), layout)
    codes, scales = _quantize_groups(groups, layout, rounding, key, saturate=True)
    scale = _bf16_bits_to_float(scales)[:, None]
    error = ((codes - bias(bits)).float() + offset(bits)) * scale - groups
    error = error.masked_fill(_places(layout, x.device) < 0, 0.0)
    step = 0.5 if rounding == "nearest" else 1.0
    num_clipped = int((error.abs() > step * 1.01 * scale).sum())
    return float(torch.linalg.vector_norm(error)), num_clipped / layout.num_values


def cast_to_bytes(values: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Write `values` as `dtype` (rounded to nearest even) into `out`: contiguous uint8 of exactly their size."""
    out.view(dtype).copy_(values.detach().to(dtype).reshape(-1))


def cast_from_bytes(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the values that `data` holds as `dtype`; they lie in the memory of `data`."""
    return data.view(dtype).view(shape)


def _to_groups(values: Tensor, layout: Layout) -> Tensor:
    """Return fp32 [num_groups, group_size], zeros where a short group has no value."""
    rows = values.reshape(layout.rows, layout.row_length)
    missing = layout.groups_per_row * layout.group_size - layout.row_length
    return torch.nn.functional.pad(rows, (0, missing)).reshape(-1, layout.group_size)


def _from_groups(groups: Tensor, layout: Layout) -> Tensor:
    return groups.reshape(layout.rows, layout.groups_per_row * layout.group_size)[:, : layout.row_length]


def _places(layout: Layout, device: torch.device) -> Tensor:
    """Return every value's place in the tensor, [num_groups, group_size] int64, −1 where there is none."""
    rows = torch.arange(layout.num_values, device=device).reshape(layout.rows, layout.row_length)
    missing = layout.groups_per_row * layout.group_size - layout.row_length
    return torch.nn.functional.pad(rows, (0, missing), value=-1).reshape(-1, layout.group_size)


def _saturated(groups: Tensor) -> Tensor:
    """Return the groups with NaN as 0 and ±infinity as ± the greatest finite magnitude of its group."""
    is_finite = groups.isfinite()
    greatest = groups.abs().masked_fill(~is_finite, 0.0).amax(dim=1, keepdim=True)
    bounded = torch.where(groups > 0, greatest, -greatest)
    return torch.where(is_finite, groups, torch.where(groups.isnan(), torch.zeros_like(groups), bounded))


def _scales_of(groups: Tensor, factor: float) -> Tensor:
    """Return the scale of each finite group as bf16 bits, int64 [num_groups]."""
    if not groups.numel():
        return torch.zeros(groups.shape[0], dtype=torch.int64, device=groups.device)
    greatest = (groups.view(torch.int32) & 0x7FFFFFFF).amax(dim=1).view(torch.float32)
    scale = (greatest * factor).clamp(max=MOST_SCALE)
    scale = torch.where(scale < LEAST, torch.zeros_like(scale), scale)
    return scale.to(torch.bfloat16).view(torch.int16).long() & 0xFFFF


def _quantize_groups(groups: Tensor, layout: Layout, rounding: str, key: int, saturate: bool) -> tuple[Tensor, Tensor]:
    """Return unsigned codes [num_groups, group_size] and scale bits [num_groups], both int64."""
    bits = layout.bits
    if saturate:
        groups = _saturated(groups)
    is_finite = groups.isfinite().all(dim=1)
    groups = torch.where(is_finite[:, None], groups, torch.zeros_like(groups))
    scales = _scales_of(groups, scale_factor(bits, rounding))
    scale = _bf16_bits_to_float(scales)[:, None]
    v = groups * torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale) - offset(bits)
    places = _places(layout, groups.device)
    if rounding == "nearest":
        q = v.round()
    elif rounding == "stochastic":
        u = ((random32(key, places) >> 9) * 2 + 1).float() * 2.0**-24
        q = (v + u).floor()
    else:
        raise ValueError(f"no rounding '{rounding}' (expected nearest or stochastic)")
    q = torch.where(scale == 0, torch.zeros_like(q), q.clamp(-bias(bits), greatest_q(bits)))
    codes = (q.long() + bias(bits)).masked_fill((places < 0) | ~is_finite[:, None], 0)
    return codes, torch.where(is_finite, scales, NAN_SCALE)


def _write_body(codes: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    body = torch.zeros(layout.body_bytes, dtype=torch.uint8, device=codes.device)
    if layout.num_values:
        low_high = torch.stack([scales & 0xFF, scales >> 8], dim=1).to(torch.uint8).reshape(-1)
        body[: low_high.numel()] = low_high
        body[layout.scales_bytes :] = _pack(codes, layout)
    return body


def _pack(codes: Tensor, layout: Layout) -> Tensor:
    shifts = torch.arange(OCTET, device=codes.device) * layout.bits
    octets = codes.reshape(layout.rows, -1, OCTET)[:, : -(-layout.row_length // OCTET)]
    words = (octets << shifts).sum(dim=2)  # 8 bits: the top value wraps into the sign, the bits are right
    places = torch.arange(layout.bits, device=codes.device) * 8
    return (words[..., None] >> places & 0xFF).to(torch.uint8).reshape(-1)


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    """Return codes [num_groups, group_size] int64, zero where a short group has no octet."""
    places = torch.arange(layout.bits, device=packed.device) * 8
    words = (packed.reshape(layout.rows, -1, layout.bits).long() << places).sum(dim=2)
    shifts = torch.arange(OCTET, device=packed.device) * layout.bits
    codes = (words[..., None] >> shifts & (1 << layout.bits) - 1).reshape(layout.rows, -1)
    missing = layout.groups_per_row * layout.group_size - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing)).reshape(-1, layout.group_size)


def _scale_bits(body: Tensor, layout: Layout) -> Tensor:
    pairs = body[: layout.num_groups * 2].long().reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 8


def _read_values(body: Tensor, layout: Layout) -> Tensor:
    """Return (q + o)·s as fp32 [num_groups, group_size]."""
    if not layout.num_values:
        return torch.zeros(layout.num_groups, layout.group_size, device=body.device)
    codes = _unpack(body[layout.scales_bytes :], layout)
    q = (codes - bias(layout.bits)).float() + offset(layout.bits)
    return q * _bf16_bits_to_float(_scale_bits(body, layout))[:, None]


def _bf16_bits_to_float(scale_bits: Tensor) -> Tensor:
    return (scale_bits << 16).to(torch.int32).view(torch.float32)


def _half(base_format: str) -> torch.dtype:
    return torch.bfloat16 if base_format == "bf16" else torch.float16


def _load(base: Tensor, shape: Sequence[int], base_format: str, group_size: int) -> Tensor:
    """Return m as fp32."""
    if base_format in BASE_BITS:
        return dequantize(base, shape, torch.float32, BASE_BITS[base_format], group_size)
    assert base.numel() == base_bytes(shape, base_format, group_size)
    return base.view(_half(base_format)).float().reshape(tuple(shape))


def _digest(base: Tensor, shape: Sequence[int], group_size: int, base_format: str) -> Tensor:
    """Return the digest of a stored message, int64 [1]."""
    if base_format not in BASE_BITS:
        stored = base.view(torch.int16).long() & 0xFFFF
        return ((stored + 1) * weight32(torch.arange(stored.numel(), device=base.device))).sum().reshape(1) & MASK32
    layout = layout_of(shape, BASE_BITS[base_format], group_size)
    if not layout.num_values:
        return torch.zeros(1, dtype=torch.int64, device=base.device)
    codes, places = _unpack(base[layout.scales_bytes :], layout), _places(layout, base.device)
    total = ((codes + 1) * weight32(places)).masked_fill(places < 0, 0).sum()
    scales = _scale_bits(base, layout)
    of_scales = (scales + 1) * weight32(torch.arange(scales.numel(), device=base.device) + 2**31)
    return (total + of_scales.sum()).reshape(1) & MASK32


def _whole(layout: Layout, device: torch.device) -> Tensor:
    """Return which groups are full, bool [num_groups, 1]."""
    last = torch.arange(layout.groups_per_row, device=device) + 1
    return (last * layout.group_size <= layout.row_length).repeat(layout.rows)[:, None]


def _signs(key: int, group_size: int, device: torch.device) -> Tensor:
    """Return ±1 for each place in a group, the same for every group."""
    return 1.0 - 2.0 * (random32(key, torch.arange(group_size, device=device)) >> 31).float()


def _walsh_hadamard(groups: Tensor) -> Tensor:
    """Rotate [num_groups, group_size] by the orthonormal Walsh–Hadamard matrix, which is its own inverse.

    Butterflies (a, b) → (a + b, a − b) over distances 1, 2, 4 …, in this order; then one multiplication by
    1/√group_size.
    """
    num_groups, size = groups.shape
    distance = 1
    while distance < size:
        pairs = groups.reshape(num_groups, size // (2 * distance), 2, distance)
        groups = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        groups = groups.reshape(num_groups, size)
        distance *= 2
    return groups * torch.tensor(1.0 / math.sqrt(size), dtype=torch.float32)
