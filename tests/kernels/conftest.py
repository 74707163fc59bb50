"""The backends that this machine can try, each with the device that it works on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from wantrain_kernels import backends

NEEDS = {"cpu": "numba", "triton": "triton", "cuda": "wantrain_kernels._cuda"}


def why_not(backend: str) -> str | None:
    """Return why a backend can't be tried here."""
    for module in (f"wantrain_kernels.{backend}_ops", NEEDS[backend]):
        if importlib.util.find_spec(module) is None:
            return f"there is no {module}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    return None


@pytest.fixture(params=[name for name in backends.NAMES if name != "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend other than the definition."""
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend works."""
    return torch.device("cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _no_word_of_infinities() -> Iterator[None]:
    """Let numpy, in which Triton's interpreter computes, be as silent about overflows as a GPU."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield
