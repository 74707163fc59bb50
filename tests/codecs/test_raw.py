"""Raw codecs keep what their dtype can hold."""

import pytest
import torch

from wantrain.codecs.codec import make_codec
from wantrain.errors import CodecError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("raw:fp32", torch.float32),
        ("raw:fp32", torch.bfloat16),
        ("raw:fp32", torch.float16),
        ("raw:bf16", torch.bfloat16),
        ("raw:fp16", torch.float16),
    ],
)
def test_dtype_that_fits_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    tensor = torch.cat([torch.randn(99), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7])]).to(dtype)
    found = make_codec(name).decode(make_codec(name).encode(tensor))
    assert torch.equal(bits(found), bits(tensor))


def test_narrow_codec_rounds_once() -> None:
    tensor = torch.randn(1000)
    found = make_codec("raw:bf16").decode(make_codec("raw:bf16").encode(tensor))
    assert torch.equal(found, tensor.bfloat16().float())


def test_non_contiguous_tensor_travels_in_order() -> None:
    tensor = torch.randn(7, 5).t()
    assert torch.equal(make_codec("raw:fp32").decode(make_codec("raw:fp32").encode(tensor)), tensor)


def test_value_beyond_fp16_is_refused() -> None:
    with pytest.raises(CodecError, match="at most 65504"):
        make_codec("raw:fp16").encode(torch.tensor([1.0, 70000.0]))


def test_infinity_itself_may_travel_as_fp16() -> None:
    found = make_codec("raw:fp16").decode(make_codec("raw:fp16").encode(torch.tensor([float("inf"), 1.0])))
    assert found.tolist() == [float("inf"), 1.0]


def test_tensor_that_needs_a_gradient_can_be_encoded() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert not make_codec("raw:fp32").decode(make_codec("raw:fp32").encode(tensor)).requires_grad
