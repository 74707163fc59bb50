from __future__ import annotations

import pytest

from wantrain.errors import ConfigError
from wantrain.launch.environment import Environment

HERE = Environment(python="3.11.7", torch="2.13.0+cpu", wantrain="0.1.0", source="0123456789abcdef", commit="5f9d7ac")


def test_this_machine_is_the_same_as_itself() -> None:
    here = Environment.here()
    here.require_same(Environment.here(), "a")
    assert len(here.source) == 16
    assert here.torch != "none"


@pytest.mark.parametrize(
    "change", [{"python": "3.11.9"}, {"torch": "2.13.0+cu128"}, {"commit": ""}], ids=["patch", "build", "wheel"]
)
def test_what_does_not_matter_may_differ(change: dict[str, str]) -> None:
    HERE.require_same(HERE.model_copy(update=change), "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.12.1"}, r"another Python \(got 3.12, expected 3.11\)"),
        ({"torch": "2.12.1"}, r"another torch \(got 2.12.1, expected 2.13.0\)"),
        ({"torch": "none"}, r"another torch \(got none"),
        (
            {"source": "f" * 16, "commit": "abc+"},
            r"another wantrain \(got 0.1.0, source ffffffff at abc\+, expected 0.1.0, source 01234567 at 5f9d7ac\)",
        ),
    ],
)
def test_what_matters_is_refused_with_both_values(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"host 'tokyo' has {said}"):
        HERE.require_same(HERE.model_copy(update=change), "tokyo")
