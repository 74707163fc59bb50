"""Quantities with a unit, parsed once at the edge and printed once at the end.

Inside wantrain a number carries its unit in its name: ``_s``, ``_bytes``, ``_bytes_per_s``, ``_flops_per_s``.
Decimal prefixes everywhere (1 MB = 10⁶ bytes); the binary ones must be spelled out (1 MiB = 2²⁰ bytes).
Bits per second exist only in text: files and terminals say "500 Mbit/s", the code says 62.5e6 bytes per second.
"""

from __future__ import annotations

import math
import re

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*?)?\s*")

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
BYTE_UNITS = {f"{p}B": f for p, f in (_DECIMAL | _BINARY).items()}
BANDWIDTH_UNITS = {f"{p}bit/s": f / 8 for p, f in _DECIMAL.items()} | {
    f"{p}B/s": f for p, f in (_DECIMAL | _BINARY).items()
}
FLOPS_UNITS = {f"{p}FLOP/s": f for p, f in _DECIMAL.items()}
FRACTION_UNITS = {"%": 0.01, "": 1.0}


def parse_quantity(text: str, units: dict[str, float], what: str) -> float:
    """Parse "500 Mbit/s" with a table of units; raise ValueError (one line) for anything else.

    The unit may be left out only where the table has an empty one; negative and non-finite numbers are refused.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} needs a unit (got {text!r}, expected text like '5 {_example(units)}')")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{what} is not a quantity (got {text!r}, expected a number and one of {_known(units)})")
    number, unit = float(match[1]), match[2] or ""
    if unit not in units:
        problem = f"has the unknown unit {unit!r}" if unit else "has no unit"
        raise ValueError(f"{what} {problem} (got {text!r}, expected one of {_known(units)})")
    if number < 0 or not math.isfinite(number):
        raise ValueError(f"{what} must not be negative or infinite (got {text!r})")
    return number * units[unit]


def _known(units: dict[str, float]) -> str:
    return ", ".join(unit or "a plain number" for unit in units)


def _example(units: dict[str, float]) -> str:
    return next((unit for unit in ("Mbit/s", "GB", "ms", "GFLOP/s", "%") if unit in units), next(iter(units)))


def parse_time_s(text: str) -> float:
    """Parse a duration such as "33 ms"."""
    return parse_quantity(text, TIME_UNITS, "time")


def parse_bytes(text: str) -> int:
    """Parse a size such as "16 GiB"."""
    return round(parse_quantity(text, BYTE_UNITS, "size"))


def parse_bytes_per_s(text: str) -> float:
    """Parse a rate such as "500 Mbit/s"; zero is refused, since nothing would ever arrive."""
    rate = parse_quantity(text, BANDWIDTH_UNITS, "rate")
    if rate == 0:
        raise ValueError(f"rate must be above zero (got {text!r})")
    return rate


def parse_flops_per_s(text: str) -> float:
    """Parse a computing speed such as "15 TFLOP/s"; zero is refused."""
    speed = parse_quantity(text, FLOPS_UNITS, "computing speed")
    if speed == 0:
        raise ValueError(f"computing speed must be above zero (got {text!r})")
    return speed


def parse_fraction(text: str) -> float:
    """Parse a share such as "0.1 %", between 0 and 1."""
    share = parse_quantity(text, FRACTION_UNITS, "share")
    if share > 1:
        raise ValueError(f"share must be at most 100 % (got {text!r})")
    return share


def _scaled(value: float, unit: str, digits: int = 3) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            return f"{value:.{digits}g} {prefix}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def format_bandwidth(bytes_per_s: float) -> str:
    """Print bytes per second as bits per second: 62.5e6 → "500 Mbit/s"."""
    return _scaled(bytes_per_s * 8, "bit/s")


def format_bytes(num_bytes: float) -> str:
    """Print a size with a decimal prefix: 6553600 → "6.55 MB"."""
    return _scaled(num_bytes, "B")


def format_time(seconds: float) -> str:
    """Print a duration: 0.033 → "33 ms", 75 → "1:15", 3700 → "1:01:40"."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor or unit == "µs":
            return f"{seconds / factor:.3g} {unit}"
    raise AssertionError("unreachable")
