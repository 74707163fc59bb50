"""The machine code of the CPU backend: vectors, no fused multiply-add, no calls into a library of mathematics."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from wantrain_kernels import cpu_kernels, cpu_ops
from wantrain_kernels.cpu_bits import FP32
from wantrain_kernels.layout import layout_of

LAYOUT = layout_of((4, 256), 4, 128)
ROWS, BODY, BASE = cpu_ops._rows(LAYOUT), cpu_ops._body(LAYOUT), cpu_ops._base(LAYOUT, "bf16")
KERNELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "quantize": (cpu_kernels.quantize, (0, FP32, ROWS, BODY, 0)),
    "delta_encode": (cpu_kernels.delta_encode, (0, FP32, ROWS, BASE, 0, BODY, 0)),
    "delta_decode": (cpu_kernels.delta_decode, (0, ROWS, BODY, BASE, 0, FP32, 0)),
}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="knows the instructions of x86-64 only")


@pytest.fixture(scope="module", params=KERNELS)
def assembly(request: pytest.FixtureRequest) -> str:
    """The instructions of a kernel, compiled anew: numba keeps no text of what it loads."""
    function, args = KERNELS[request.param]
    code = numba.njit(nogil=True, error_model="numpy")(function.__wrapped__)  # type: ignore[attr-defined]
    code.compile(tuple(numba.typeof(arg) for arg in args))
    return "\n".join(code.inspect_asm().values())


def test_loops_are_vectors(assembly: str) -> None:
    for packed in ("mulps", "addps", "subps", "maxs?d", "mins?d"):
        assert re.search(rf"\sv?p?{packed}\b", assembly), f"no {packed}"
    # What remains of a row is unrolled: without AVX-512 that is twice as many scalar instructions (seen).
    assert assembly.count("mulps") > assembly.count("mulss") / 3


def test_nothing_is_fused(assembly: str) -> None:
    assert not re.search(r"\svfn?m(add|sub)", assembly)


def test_no_rounding_is_left_to_a_library(assembly: str) -> None:
    assert not re.search(r"\b(rintf?|floorf?|roundf?|__truncsfhf2|__extendhfsf2|memcpy@plt)\b", assembly)


def test_kernels_are_compiled_once_for_all_options() -> None:
    for bits, group_size in ((2, 32), (8, 256)):
        layout = layout_of((3, 70), bits, group_size)
        args = (cpu_ops._rows(layout), cpu_ops._body(layout, "stochastic", 2**40, True), cpu_ops._base(layout, "q4"))
        assert [numba.typeof(arg) for arg in args] == [numba.typeof(arg) for arg in (ROWS, BODY, BASE)]
    assert numba.typeof(BODY.levels.factor) == numba.typeof(np.float32(1))
