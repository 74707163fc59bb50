"""What a codec's name says. Run files and plans name codecs as strings, so that they can be read and edited:

    raw:fp32 · raw:bf16 · raw:fp16     values as they are
    quantized:4                        4 bits a value, one scale per group
    hadamard:4                         the same, every group rotated first: for data that is seen once
    aqsgd:4,base=bf16,first=raw:fp32   the difference to what was last sent for the same sample
    cocktail:4,mask=0.1,top=0.2        gradients: a tenth at random, of these the greatest fifth, in 4 bits
    error_feedback:quantized:4         gradients: what was lost is added next time

More keys: group=128 (values that share a scale), rounding=nearest or stochastic, nonfinite=error or saturate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wantrain.errors import ConfigError, did_you_mean

RAW_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128, 256)
BASE_FORMATS = ("bf16", "fp16", "q8", "q4")
KINDS = ("raw", "quantized", "hadamard", "aqsgd", "cocktail")
_FEEDBACK = "error_feedback:"


@dataclass(frozen=True)
class CodecSpec:
    """One codec, with everything that both ends must agree on."""

    kind: str
    dtype: str = ""
    """Of raw."""
    bits: int = 32
    group_size: int = 128
    rounding: str = "nearest"
    saturate: bool = False
    base_format: str = "bf16"
    first: str = "raw:fp32"
    """How aqsgd sends a sample's first visit, and data without identity: the name of a codec."""
    mask: float = 0.1
    top: float = 0.2
    has_feedback: bool = False

    @property
    def family(self) -> str:
        """Return what the header of a payload calls it: raw with its dtype, others without their numbers."""
        return f"raw:{self.dtype}" if self.kind == "raw" else self.kind

    @property
    def remembers(self) -> bool:
        """Whether both ends keep something per sample, and so must agree on it."""
        return self.kind == "aqsgd"


def _one_of(known: tuple[Any, ...]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        by_text = {str(one): one for one in known}
        if text not in by_text:
            raise ValueError(f"expected one of {', '.join(by_text)}")
        return by_text[text]

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("expected a share above 0, at most 1")
    return value


def _first(text: str) -> str:
    if parse_codec(text).kind not in ("raw", "quantized", "hadamard"):
        raise ValueError("expected raw, quantized or hadamard")
    return text


_QUANTIZING = {
    "group": ("group_size", _one_of(GROUP_SIZES)),
    "rounding": ("rounding", _one_of(("nearest", "stochastic"))),
    "nonfinite": ("saturate", lambda text: _one_of(("error", "saturate"))(text) == "saturate"),
}
_KEYS: dict[str, dict[str, tuple[str, Callable[[str], Any]]]] = {
    "raw": {},
    "quantized": _QUANTIZING,
    "hadamard": _QUANTIZING,
    "aqsgd": _QUANTIZING | {"base": ("base_format", _one_of(BASE_FORMATS)), "first": ("first", _first)},
    "cocktail": _QUANTIZING | {"mask": ("mask", _share), "top": ("top", _share)},
}


@functools.cache
def parse_codec(name: str) -> CodecSpec:
    """Return what a codec's name says; raise ConfigError that says what is wrong with it."""
    if name.startswith(_FEEDBACK):
        inner = parse_codec(name.removeprefix(_FEEDBACK))
        if inner.has_feedback or inner.remembers:
            raise ConfigError(f"codec '{name}' can't be (error_feedback takes raw, quantized, hadamard or cocktail)")
        return CodecSpec(**(vars(inner) | {"has_feedback": True}))
    head, *options = name.split(",")
    kind, _, argument = head.partition(":")
    if kind not in KINDS:
        hint = did_you_mean(kind, (*KINDS, "error_feedback"))
        raise ConfigError(f"unknown codec '{name}'{hint}; known are {', '.join(KINDS)} and error_feedback over them")
    given: dict[str, Any] = {"kind": kind}
    try:
        if kind == "raw":
            given["bits"] = RAW_BITS[_one_of(tuple(RAW_BITS))(argument)]
            given["dtype"] = argument
        else:
            given["bits"] = _one_of(BITS)(argument)
    except ValueError as caught:
        hint = did_you_mean(argument, RAW_BITS) if kind == "raw" else ""
        raise ConfigError(
            f"unknown codec '{name}'{hint}; '{kind}' takes {str(caught).removeprefix('expected ')}"
        ) from None
    for option in options:
        key, _, value = option.partition("=")
        if key not in _KEYS[kind]:
            raise ConfigError(
                f"codec '{name}' has no key '{key}'{did_you_mean(key, _KEYS[kind])}; '{kind}' takes"
                f" {', '.join(_KEYS[kind]) or 'none'}"
            )
        field, parse = _KEYS[kind][key]
        try:
            given[field] = parse(value)
        except ValueError as caught:
            raise ConfigError(f"codec '{name}': {key} = '{value}' ({caught})") from None
    return CodecSpec(**given)


def check_activation_codec(name: str, *, is_forward: bool) -> str:
    """Return the name; raise ConfigError where it can't carry activations (forward) or their gradients."""
    spec = parse_codec(name)
    if spec.has_feedback or spec.kind == "cocktail":
        raise ConfigError(f"codec '{name}' is for weight gradients only; use raw, quantized, hadamard or aqsgd")
    if spec.remembers and not is_forward:
        raise ConfigError(
            f"codec '{name}' can't carry gradients of activations, which have no last value; use quantized"
        )
    return name


def check_gradient_codec(name: str) -> str:
    """Return the name; raise ConfigError where it can't carry weight gradients."""
    spec = parse_codec(name)
    if spec.remembers:
        raise ConfigError(f"codec '{name}' is for activations; use error_feedback:quantized:{spec.bits}")
    return name
