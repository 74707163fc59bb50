"""What every kernel computes, in plain PyTorch: the definition that faster ones must match byte for byte."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_to_bytes(values: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Write `values` as `dtype` (rounded to nearest even) into `out`: contiguous uint8 of exactly their size."""
    out.view(dtype).copy_(values.detach().to(dtype).reshape(-1))


def cast_from_bytes(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the values that `data` holds as `dtype`; they lie in the memory of `data`."""
    return data.view(dtype).view(shape)
