"""Quantization of activations and gradients as fused kernels: the same bytes from every backend."""

from wantrain_kernels.layout import Layout, base_bytes, layout_of
from wantrain_kernels.ops import (
    base_load,
    base_store,
    delta_decode,
    delta_encode,
    dequantize,
    hadamard_dequantize,
    hadamard_quantize,
    quantize,
)
from wantrain_kernels.reference import num_nonfinite_groups
from wantrain_kernels.warm_up import warm_up

__all__ = [
    "Layout",
    "base_bytes",
    "base_load",
    "base_store",
    "delta_decode",
    "delta_encode",
    "dequantize",
    "hadamard_dequantize",
    "hadamard_quantize",
    "layout_of",
    "num_nonfinite_groups",
    "quantize",
    "warm_up",
]
