import math

import pytest

from wantrain import units


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("500 Mbit/s", 62.5e6), ("1Gbit/s", 125e6), ("10 MB/s", 10e6), ("1 MiB/s", 2**20), ("8 bit/s", 1.0)],
)
def test_rates_are_decimal_bits_or_bytes_as_written(text: str, bytes_per_s: float) -> None:
    assert units.parse_bytes_per_s(text) == bytes_per_s


def test_binary_prefixes_must_be_spelled_out() -> None:
    assert units.parse_bytes("16 GiB") == 16 * 2**30
    assert units.parse_bytes("16 GB") == 16 * 10**9


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("500", "has no unit"),
        ("-5 Mbit/s", "must not be negative"),
        ("5 Mbps", "unknown unit 'Mbps'"),
        ("fast", "not a quantity"),
        ("0 Mbit/s", "above zero"),
        ("1e999 Mbit/s", "infinite"),
    ],
)
def test_a_bad_rate_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        units.parse_bytes_per_s(text)


def test_a_bare_number_is_refused_where_text_is_expected() -> None:
    with pytest.raises(ValueError, match="needs a unit"):
        units.parse_time_s(5)  # type: ignore[arg-type]


def test_shares_are_percent_or_plain_and_at_most_one() -> None:
    assert units.parse_fraction("0.1 %") == pytest.approx(0.001)
    assert units.parse_fraction("0.5") == 0.5
    with pytest.raises(ValueError, match="at most"):
        units.parse_fraction("101 %")


@pytest.mark.parametrize(
    ("printed", "text"),
    [
        (units.format_bandwidth(62.5e6), "500 Mbit/s"),
        (units.format_bytes(6553600), "6.55 MB"),
        (units.format_time(0.033), "33 ms"),
        (units.format_time(75), "1:15"),
        (units.format_time(3700), "1:01:40"),
        (units.format_time(2.5e-5), "25 µs"),
    ],
)
def test_quantities_print_with_a_fitting_prefix(printed: str, text: str) -> None:
    assert printed == text


def test_what_is_printed_parses_back() -> None:
    for rate in (1e3, 62.5e6, 1.25e9):
        assert math.isclose(units.parse_bytes_per_s(units.format_bandwidth(rate)), rate, rel_tol=0.01)
