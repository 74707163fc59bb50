"""Where the bytes of a quantized tensor lie: pure arithmetic that every backend and the wire format share.

A tensor is rows of its last dimension. In a row, `group_size` consecutive values share a scale; the last group of a row
may be short. One body holds

    [ scales: bf16, one per group, zero bytes up to a multiple of 16 ][ codes ]

Codes are packed by octets: eight consecutive values of a group make one little-endian integer of `bits` bytes, value i
in bits [i·bits, (i+1)·bits). So every supported number of bits is dense and nothing straddles two octets:

    4 bits   byte 0 = c0 | c1<<4    byte 1 = c2 | c3<<4   …                                  4 bytes per octet
    3 bits   byte 0 = c0 | c1<<3 | c2<<6    byte 1 = c2>>2 | c3<<1 | c4<<4 | c5<<7    …      3 bytes per octet

A short group of k values takes ⌈k/8⌉ octets; the bits of values that are missing are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128, 256)
OCTET = 8
SCALE_BYTES = 2
_SCALES_ALIGNMENT = 16
"""Chosen: codes begin where a GPU thread may read or write 16 bytes at once."""


@dataclass(frozen=True)
class Layout:
    """The places of scales and codes of `rows` × `row_length` values."""

    rows: int
    row_length: int
    bits: int
    group_size: int

    @property
    def num_values(self) -> int:
        return self.rows * self.row_length

    @property
    def groups_per_row(self) -> int:
        return -(-self.row_length // self.group_size)

    @property
    def num_groups(self) -> int:
        return self.rows * self.groups_per_row

    @property
    def scales_bytes(self) -> int:
        """Return the bytes before the first code."""
        return -(-self.num_groups * SCALE_BYTES // _SCALES_ALIGNMENT) * _SCALES_ALIGNMENT

    @property
    def row_code_bytes(self) -> int:
        return -(-self.row_length // OCTET) * self.bits

    @property
    def codes_bytes(self) -> int:
        return self.rows * self.row_code_bytes

    @property
    def body_bytes(self) -> int:
        return self.scales_bytes + self.codes_bytes


def layout_of(shape: Sequence[int], bits: int, group_size: int) -> Layout:
    """Return the layout of a tensor of this shape; raise ValueError for bits or groups that no backend has."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"no layout for {bits} bits in groups of {group_size} (expected {BITS}, {GROUP_SIZES})")
    row_length = shape[-1] if shape else 1
    return Layout(math.prod(shape[:-1]) if shape else 1, row_length, bits, group_size)


BASE_FORMATS = ("bf16", "fp16", "q8", "q4")
BASE_BITS = {"q8": 8, "q4": 4}


def base_bytes(shape: Sequence[int], base_format: str, group_size: int) -> int:
    """Return the bytes of one stored message (a base) of a tensor of this shape."""
    if base_format not in BASE_FORMATS:
        raise ValueError(f"no base format '{base_format}' (expected {', '.join(BASE_FORMATS)})")
    if base_format in BASE_BITS:
        return layout_of(shape, BASE_BITS[base_format], group_size).body_bytes
    return 2 * math.prod(shape)
