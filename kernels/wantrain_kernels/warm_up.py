"""Make machine code before anything waits for it: the CPU's kernels are compiled at their first call, for seconds."""

from __future__ import annotations

from collections.abc import Collection

import torch

from wantrain_kernels import ops
from wantrain_kernels.layout import base_bytes

_SHAPE, _BITS, _GROUP_SIZE = (1, 32), 4, 32
"""Any will do: the code is the same for all."""


def warm_up(kinds: Collection[str]) -> None:
    """Run once on the CPU what codecs of these kinds (`quantized`, `hadamard`, `aqsgd`, `cocktail`) run."""
    x = torch.zeros(_SHAPE)
    if {"quantized", "cocktail"} & set(kinds):
        ops.dequantize(ops.quantize(x, _BITS, _GROUP_SIZE), _SHAPE, x.dtype, _BITS, _GROUP_SIZE)
    if "hadamard" in kinds:
        body = ops.hadamard_quantize(x, _BITS, _GROUP_SIZE, key=0)
        ops.hadamard_dequantize(body, _SHAPE, x.dtype, _BITS, _GROUP_SIZE, key=0)
    if "aqsgd" in kinds:
        base = torch.zeros(base_bytes(_SHAPE, "bf16", _GROUP_SIZE), dtype=torch.uint8)
        ops.base_store(x, base, _GROUP_SIZE, "bf16")
        ops.base_load(base, _SHAPE, x.dtype, _GROUP_SIZE, "bf16")
        body, _ = ops.delta_encode(x, base, _BITS, _GROUP_SIZE, "bf16")
        ops.delta_decode(body, base, _SHAPE, x.dtype, _BITS, _GROUP_SIZE, "bf16")
