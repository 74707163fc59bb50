"""What a codec's name says. Run files and plans name codecs as strings, so that they can be read and edited:

    raw:fp32 · raw:bf16 · raw:fp16     values as they are
    quantized:4                        4 bits a value, one scale per group
    hadamard:4                         the same, every group rotated first: for data that is seen once
    aqsgd:4,base=bf16,first=raw:fp32   the difference to what was last sent for the same sample
    cocktail:4,mask=0.1,top=0.2        gradients: a tenth at random, of these the greatest fifth, in 4 bits
    error_feedback:quantized:4         gradients: what was lost is added next time

More keys: group=128 (values that share a scale), rounding=nearest or stochastic, nonfinite=error or saturate.

A codec of one's own goes by its name and bits, once every process that meets it has told `register_codec` of it.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class OwnCodec:
    """What `register_codec` was told; see there."""

    make: Callable[[CodecSpec, int, int], Any]
    body_bytes: Callable[[tuple[int, ...], int], int]
    bits: tuple[int, ...]
    number: int
    """What a payload's header calls it: above those of wantrain's own, and the same in every process."""


_OWN: dict[str, OwnCodec] = {}


def register_codec(
    kind: str,
    make: Callable[[CodecSpec, int, int], Any],
    *,
    body_bytes: Callable[[tuple[int, ...], int], int],
    bits: Sequence[int],
) -> None:
    """Make a codec known by name: `kind:bits`, or `kind` alone where there is only one number of bits.

    `make` is a class derived from `wantrain.Codec`, called with spec, stream and seed; `body_bytes` says how large a
    body is for a tensor's shape and a number of bits, from nothing else: both ends and the planner count with it.
    Every process that meets the name must register it, before a plan or run file that names it is read. Registering a
    name again replaces it; raises ConfigError for the name of a codec that comes with wantrain, and for no bits.
    """
    if kind in (*KINDS, _FEEDBACK.rstrip(":")) or not re.fullmatch("[a-z][a-z0-9_]*", kind):
        raise ConfigError(f"a codec can't be called '{kind}'; choose another name, of small letters, digits and '_'")
    if not bits or not all(1 <= one <= 32 for one in bits):
        raise ConfigError(f"codec '{kind}' needs bits per value from 1 to 32 (got {list(bits)}); name them all")
    number = 256 + zlib.crc32(kind.encode()) % 65280
    taken = next((name for name, own in _OWN.items() if own.number == number and name != kind), None)
    if taken is not None:
        raise ConfigError(f"codecs '{kind}' and '{taken}' look alike in a header; choose another name")
    _OWN[kind] = OwnCodec(make, body_bytes, tuple(sorted(bits)), number)
    parse_codec.cache_clear()


def unregister_codec(kind: str) -> None:
    """Forget a registered codec."""
    del _OWN[kind]
    parse_codec.cache_clear()


def own_codec(kind: str) -> OwnCodec | None:
    """Return what was registered under a name; None for wantrain's own codecs and for none at all."""
    return _OWN.get(kind)


def own_kind(number: int) -> str | None:
    """Return which registered codec a header's number means."""
    return next((kind for kind, own in _OWN.items() if own.number == number), None)


def bits_of(kind: str) -> tuple[int, ...]:
    """Return how many bits a codec's payloads may have, fewest first."""
    own = own_codec(kind)
    return BITS if own is None else own.bits


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
    own = own_codec(kind)
    if kind not in KINDS and own is None:
        hint = did_you_mean(kind, (*KINDS, *_OWN, "error_feedback"))
        known = ", ".join((*KINDS, *_OWN))
        raise ConfigError(f"unknown codec '{name}'{hint}; known are {known} and error_feedback over them")
    if own is not None and not argument and len(own.bits) == 1:
        argument = str(own.bits[0])
    given: dict[str, Any] = {"kind": kind}
    try:
        if kind == "raw":
            given["bits"] = RAW_BITS[_one_of(tuple(RAW_BITS))(argument)]
            given["dtype"] = argument
        else:
            given["bits"] = _one_of(bits_of(kind))(argument)
    except ValueError as caught:
        hint = did_you_mean(argument, RAW_BITS) if kind == "raw" else ""
        raise ConfigError(
            f"unknown codec '{name}'{hint}; '{kind}' takes {str(caught).removeprefix('expected ')}"
        ) from None
    for option in options:
        key, _, value = option.partition("=")
        keys = _KEYS.get(kind, {})
        if key not in keys:
            raise ConfigError(
                f"codec '{name}' has no key '{key}'{did_you_mean(key, keys)}; '{kind}' takes"
                f" {', '.join(keys) or 'none'}"
            )
        field, parse = keys[key]
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
