"""What the Triton kernels are made of: functions on one tile of values, [groups, octets, 8].

An octet's eight values sit in one thread: with 16-bit data that is one 16-byte load, codes are packed without leaving
the thread, and a group's maximum needs a few shuffles inside a warp.

Everything here gives the bits of `reference`. What must be so for that, and how it is done:

    rounding q         no rint in the interpreter, so v + 1.5·2^23: at that size an fp32 number's step is 1, the sum
                       rounds to nearest even (|v| stays below 2^8), and q stands in its low bits: it is packed from
                       there, no conversion to int is needed
    floor              compiled it would flush small numbers to zero: rounded as above, less 1 where that went up
    fp32 → bf16        the interpreter truncates: there by integers; compiled, the hardware's own cvt.rn
    1 / scale          div_rn; a plain `/` becomes an approximate division
    a·b + c            must not fuse: launched with enable_fp_fusion=False
    sums of uint32     the interpreter's grow to 64 bits: see `sum32`
    bits to q + ½      no conversion either: a code in the mantissa of 2^22, whose step is ½, minus a constant; exact
"""

import triton
import triton.language as tl

from wantrain_kernels import reference
from wantrain_kernels.layout import BITS

_MAGIC = tl.constexpr(12582912.0)  # 1.5·2^23
_MAGIC_BITS = 0x4B400000
_HALF_STEP = tl.constexpr(0x4A800000)  # the bits of 2^22
_RANDOM_STEP = tl.constexpr(2.0**-24)
_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
NAN_SCALE = tl.constexpr(reference.NAN_SCALE)
LEAST = tl.constexpr(reference.LEAST)
_MOST_SCALE = tl.constexpr(reference.MOST_SCALE)
WEIGHT = tl.constexpr(0x9E3779B1)

# A constexpr function may read values but call no plain function, so what depends on bits stands in tables.
_OFFSET = {bits: reference.offset(bits) for bits in BITS}
_BIAS = {bits: reference.bias(bits) for bits in BITS}
_GREATEST_Q = {bits: reference.greatest_q(bits) for bits in BITS}
_FACTOR = {
    (bits, stochastic): reference.scale_factor(bits, "stochastic" if stochastic else "nearest")
    for bits in BITS
    for stochastic in (False, True)
}


@triton.constexpr_function
def _offset(bits):
    return _OFFSET[bits]


@triton.constexpr_function
def _factor(bits, stochastic):
    return _FACTOR[bits, stochastic]


@triton.constexpr_function
def _lowest(bits):
    return 12582912.0 - _BIAS[bits]


@triton.constexpr_function
def _highest(bits):
    return 12582912.0 + _GREATEST_Q[bits]


@triton.constexpr_function
def _lowest_bits(bits):
    return _MAGIC_BITS - _BIAS[bits]


@triton.constexpr_function
def _packed_lowest(bits):
    """Return what the lowest code's bits add up to in a packed word, mod 2^32."""
    num_codes = 8 if bits <= 4 else 4
    return sum((_MAGIC_BITS - _BIAS[bits]) << (i * bits) for i in range(num_codes)) & 0xFFFFFFFF


@triton.constexpr_function
def _word_mask(bits):
    return (1 << (8 * bits if bits <= 4 else 4 * bits)) - 1


@triton.constexpr_function
def _zero_level(bits):
    return 2.0**22 + _BIAS[bits] - _OFFSET[bits]


@triton.jit
def sum32(words, axis: tl.constexpr):
    """Sum uint32 mod 2^32; the two casts vanish when compiled and cut the interpreter's sum to size."""
    return tl.sum(words, axis=axis).to(tl.uint64).to(tl.uint32)


@triton.jit
def _mix32(number):
    number = (number ^ (number >> 16)) * 0x21F0AAAD
    number = (number ^ (number >> 15)) * 0xD35A2D97
    return number ^ (number >> 15)


@triton.jit
def random32(places, key_low, key_high):
    """Return a pseudo-random uint32 for each place (uint32)."""
    return _mix32(_mix32(places ^ key_low.to(tl.uint32)) + key_high.to(tl.uint32))


@triton.jit
def odd32(number):
    return ((number ^ (number >> 15)) * 0x85EBCA77) | 1


@triton.jit
def digest_of(stored, first, present):
    """Return the part of the digest that each octet gives, uint32 [groups, octets]."""
    step = tl.arange(0, 8).to(tl.uint32) * WEIGHT
    weights = odd32((first.to(tl.uint32) * WEIGHT)[:, :, None] + step[None, None, :])
    parts = (stored + 1) * weights
    return sum32(tl.where(present, parts, 0), 2)


_COMPILED = tl.constexpr(isinstance(sum32, triton.JITFunction))


@triton.jit
def to_bf16_bits(values):
    """Round fp32 to bf16, nearest even; return the bits as uint32. (NaN must be quiet, as all that we make are.)"""
    if _COMPILED:
        rounded = values.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded


@triton.jit
def to_fp32(bf16_bits):
    return (bf16_bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def places(first):
    """Return every value's place in the tensor, mod 2^32."""
    return first.to(tl.uint32)[:, :, None] + tl.arange(0, 8).to(tl.uint32)[None, None, :]


@triton.jit
def saturated(values):
    """Return NaN as 0 and ±infinity as ± the greatest finite magnitude of its group."""
    magnitude = values.to(tl.int32, bitcast=True) & _MAGNITUDE
    greatest = tl.max(tl.max(tl.where(magnitude < _INFINITY, magnitude, 0), axis=2), axis=1)
    bound = greatest.to(tl.float32, bitcast=True)[:, None, None]
    bounded = tl.where(values > 0, bound, -bound)
    return tl.where(magnitude < _INFINITY, values, tl.where(magnitude > _INFINITY, 0.0, bounded))


@triton.jit
def scale_of(values, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Return each group's scale as bf16 bits, uint32 [groups]; that of NaN if a value is not finite."""
    greatest = tl.max(tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=2), axis=1)
    is_finite = greatest < _INFINITY
    greatest = tl.where(is_finite, greatest, 0).to(tl.float32, bitcast=True)
    FACTOR: tl.constexpr = _factor(BITS, STOCHASTIC)
    scale = tl.minimum(greatest * FACTOR, _MOST_SCALE)
    return tl.where(is_finite, to_bf16_bits(tl.where(scale < LEAST, 0.0, scale)), NAN_SCALE)


@triton.jit
def round_levels(values, scale, places, key_low, key_high, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Return 1.5·2^23 + q."""
    is_zero = scale == 0
    inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, to_fp32(tl.where(is_zero, 0x3F80, scale))))
    OFFSET: tl.constexpr = _offset(BITS)
    levels = values * inverse[:, None, None]
    if OFFSET != 0.0:
        levels -= OFFSET
    if STOCHASTIC:
        random = ((random32(places, key_low, key_high) >> 9) * 2 + 1).to(tl.int32).to(tl.float32)
        levels = tl.where(is_zero[:, None, None], 0.0, levels + random * _RANDOM_STEP)
    raised = levels + _MAGIC
    if STOCHASTIC:
        raised = tl.where(raised - _MAGIC > levels, raised - 1.0, raised)
    LOWEST: tl.constexpr = _lowest(BITS)
    HIGHEST: tl.constexpr = _highest(BITS)
    return tl.minimum(tl.maximum(raised, LOWEST), HIGHEST)


@triton.jit
def level_values(raised, scale, BITS: tl.constexpr):
    """Return (q + o)·scale from 1.5·2^23 + q."""
    OFFSET: tl.constexpr = _offset(BITS)
    levels = raised - _MAGIC
    if OFFSET != 0.0:
        levels += OFFSET
    return levels * to_fp32(scale)[:, None, None]


@triton.jit
def pack(raised, scale, present, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Return each octet's codes in two words [groups, octets]: all in `low` up to 4 bits, else values 4 to 7 in `high`.

    What stands above a code in 1.5·2^23 + q is the same for all, so it may overlap, and is taken off the sum.
    """
    bits = raised.to(tl.uint32, bitcast=True)
    if ROWS == "values":
        bits = tl.where(present, bits, _lowest_bits(BITS))
    i = tl.arange(0, 8)[None, None, :]
    LOWEST: tl.constexpr = _packed_lowest(BITS)
    MASK: tl.constexpr = _word_mask(BITS)
    is_finite = (scale != NAN_SCALE)[:, None]
    if BITS <= 4:
        low = (sum32(bits << (i * BITS).to(tl.uint32), 2) - LOWEST) & MASK
        high = low
    else:
        shifted = bits << (i % 4 * BITS).to(tl.uint32)
        low = (sum32(tl.where(i < 4, shifted, 0), 2) - LOWEST) & MASK
        high = (sum32(tl.where(i < 4, 0, shifted), 2) - LOWEST) & MASK
    return tl.where(is_finite, low, 0), tl.where(is_finite, high, 0)


@triton.jit
def _spread(words):
    """Repeat [groups, octets] eight times along a new last axis, inside a thread."""
    twice = tl.join(words, words)
    four = tl.join(twice, twice)
    return tl.reshape(tl.join(four, four), [words.shape[0], words.shape[1], 8])


@triton.jit
def unpack(low, high, BITS: tl.constexpr):
    """Return the codes, uint32 [groups, octets, 8]."""
    i = tl.arange(0, 8)[None, None, :]
    if BITS <= 4:
        words = _spread(low) >> (i * BITS).to(tl.uint32)
    else:
        words = tl.where(i < 4, _spread(low), _spread(high)) >> (i % 4 * BITS).to(tl.uint32)
    return words & ((1 << BITS) - 1)


@triton.jit
def code_values(codes, scale, BITS: tl.constexpr):
    """Return (q + o)·scale from codes."""
    ZERO: tl.constexpr = _zero_level(BITS)
    return (((codes << 1) | _HALF_STEP).to(tl.float32, bitcast=True) - ZERO) * to_fp32(scale)[:, None, None]
