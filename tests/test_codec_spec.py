"""Names of codecs: what they say, and what is refused."""

import pytest

from wantrain.codec_spec import CodecSpec, check_activation_codec, check_gradient_codec, parse_codec
from wantrain.errors import ConfigError


def test_a_name_says_everything_both_ends_must_know() -> None:
    spec = parse_codec("aqsgd:3,group=64,rounding=stochastic,base=q8,first=hadamard:8,nonfinite=saturate")
    assert spec == CodecSpec("aqsgd", "", 3, 64, "stochastic", True, "q8", "hadamard:8")
    assert spec.remembers


def test_what_is_not_said_has_a_default() -> None:
    assert parse_codec("quantized:4") == CodecSpec("quantized", bits=4, group_size=128, rounding="nearest")
    assert parse_codec("raw:bf16").bits == 16


def test_error_feedback_takes_any_codec_without_a_memory() -> None:
    spec = parse_codec("error_feedback:cocktail:4,mask=0.05,top=0.5")
    assert spec.has_feedback
    assert (spec.kind, spec.mask, spec.top) == ("cocktail", 0.05, 0.5)
    for name in ("error_feedback:aqsgd:4", "error_feedback:error_feedback:quantized:4"):
        with pytest.raises(ConfigError, match="error_feedback takes"):
            parse_codec(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantised:4", r"unknown codec 'quantised:4' \(did you mean 'quantized'\?\)"),
        ("quantized", "'quantized' takes one of 2, 3, 4, 6, 8"),
        ("quantized:5", "'quantized' takes one of 2, 3, 4, 6, 8"),
        ("raw:fp61", "did you mean 'fp16'"),
        ("quantized:4,groop=64", r"no key 'groop' \(did you mean 'group'\?\)"),
        ("quantized:4,group=100", "group = '100' .expected one of 32, 64, 128, 256"),
        ("quantized:4,base=bf16", "no key 'base'"),
        ("raw:fp32,group=64", "'raw' takes none"),
        ("aqsgd:4,first=aqsgd:4", "expected raw, quantized or hadamard"),
        ("aqsgd:4,first=quantised:4", "did you mean 'quantized'"),
        ("cocktail:4,mask=2", "expected a share above 0, at most 1"),
    ],
)
def test_what_is_wrong_is_said(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_codec(name)


def test_codecs_carry_what_they_are_made_for() -> None:
    assert check_activation_codec("aqsgd:4", is_forward=True) == "aqsgd:4"
    assert check_gradient_codec("error_feedback:quantized:4") == "error_feedback:quantized:4"
    with pytest.raises(ConfigError, match="have no last value"):
        check_activation_codec("aqsgd:4", is_forward=False)
    for name in ("cocktail:4", "error_feedback:quantized:4"):
        with pytest.raises(ConfigError, match="for weight gradients only"):
            check_activation_codec(name, is_forward=True)
    with pytest.raises(ConfigError, match="use error_feedback:quantized:4"):
        check_gradient_codec("aqsgd:4")
