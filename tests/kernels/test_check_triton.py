"""The Triton kernels compile for a GPU that is not here, without anything that would change a result."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
        /*0010*/                   FADD R2, R2, 1 ;                  /* 0x3f80000002027421 */
        /*0020*/                   FMUL R2, R2, R3 ;                 /* 0x0000000302027220 */
        /*0030*/              @!P0 BRA 0x10 ;                        /* 0xffffffd000008947 */
        /*0040*/                   EXIT ;                            /* 0x000000000000794d */
        /*0050*/                   BRA 0x50;                         /* 0xfffffff000007947 */
"""


@pytest.fixture
def check_triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(KERNELS))
    return importlib.import_module("check_triton")


def test_a_loop_is_counted_from_its_jump_back(check_triton: ModuleType) -> None:
    assert check_triton.loop_length(SASS) == 3


def test_every_operation_is_compiled_at_every_width(check_triton: ModuleType) -> None:
    titles = {variant.title for variant in check_triton.variants()}
    operations = ("quantize", "dequantize", "delta_encode", "delta_decode")
    assert {f"{name} {bits} bits" for name in operations for bits in (2, 3, 4, 6, 8)} <= titles
    assert len(titles) == len(list(check_triton.variants()))


@pytest.mark.parametrize("title", ["delta_encode 4 bits, stochastic", "delta_decode 4 bits, base q8"])
def test_kernels_compile_without_spills_or_anything_that_would_change_a_result(title: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(KERNELS / "check_triton.py"), title],
        env=os.environ | {"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert title in done.stdout
