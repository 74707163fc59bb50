"""The definition of the casts that go over the wire."""

import pytest
import torch

from wantrain_kernels import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_values", [0, 1, 63, 64, 65])
def test_cast_from_bytes_inverts_cast_to_bytes(dtype: torch.dtype, num_values: int) -> None:
    values = torch.randn(num_values).to(dtype)
    out = torch.full((num_values * dtype.itemsize,), 255, dtype=torch.uint8)
    reference.cast_to_bytes(values, dtype, out)
    assert torch.equal(reference.cast_from_bytes(out, dtype, (num_values,)), values)


def test_cast_rounds_to_nearest_even() -> None:
    out = torch.empty(4, dtype=torch.uint8)
    reference.cast_to_bytes(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8]), torch.bfloat16, out)
    assert reference.cast_from_bytes(out, torch.bfloat16, (2,)).tolist() == [1.0, 1 + 2**-6]


def test_cast_reads_non_contiguous_values_in_order() -> None:
    values = torch.arange(6.0).reshape(2, 3).t()
    out = torch.empty(24, dtype=torch.uint8)
    reference.cast_to_bytes(values, torch.float32, out)
    assert torch.equal(reference.cast_from_bytes(out, torch.float32, (3, 2)), values)
