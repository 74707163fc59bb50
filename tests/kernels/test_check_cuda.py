"""What the compiled kernels are searched for is found where it is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "check_cuda.py"
_spec = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
check_cuda = importlib.util.module_from_spec(_spec)
sys.modules["check_cuda"] = check_cuda
_spec.loader.exec_module(check_cuda)

SAID = """\
ptxas info    : Compiling entry function '_ZN8wantrain5startINS_6EncodeILi4ELNS_4TypeE1ELS2_3ELb1ELb0EEEEEvNS_3JobE'
ptxas info    : Function properties for _ZN8wantrain5startINS_6EncodeILi4ELNS_4TypeE1ELS2_3ELb1ELb0EEEEEvNS_3JobE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 16 bytes cumulative stack size, 32 bytes smem
ptxas info    : Function properties for __internal_reciprocal
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers
"""


def test_a_kernel_is_reported_with_its_registers_spills_and_shared_memory() -> None:
    (kernel,) = check_cuda.kernels_of(SAID)
    assert (kernel.registers, kernel.spilled_bytes, kernel.shared_bytes) == (63, 16, 32)
    assert str(kernel) == "Encode 4 bits, bf16, base - stochastic, piece by piece"


@pytest.mark.parametrize(
    "line",
    [
        "fma.rn.f32 %f1, %f2, %f3, %f4;",
        "mad.rn.f32 %f1, %f2, %f3, %f4;",
        "div.approx.f32 %f1, %f2, %f3;",
        "div.full.f32 %f1, %f2, %f3;",
        "rcp.approx.ftz.f32 %f1, %f2;",
        "mul.f32 %f1, %f2, %f3;",
        "add.rn.ftz.f32 %f1, %f2, %f3;",
    ],
)
def test_what_would_change_a_result_is_found_in_ptx(line: str) -> None:
    assert list(check_cuda.faults_in_ptx(f"ld.global.u32 %r1, [%rd1];\n\t{line}\n"))


def test_sums_and_products_with_a_rounding_are_allowed_in_ptx() -> None:
    allowed = ("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "add.rm.f32", "rcp.rn.f32", "mad.lo.s32", "mul.wide.u32")
    assert not list(check_cuda.faults_in_ptx("\n".join(f"\t{name} %1, %2, %3;" for name in allowed)))


def test_fused_sums_beyond_those_of_a_reciprocal_are_found_in_sass() -> None:
    reciprocal = "MUFU.RCP R7, R0 ;\nFFMA R2, R0, R7, -1 ;\nFFMA R7, R7, R2, R7 ;\n"
    assert not list(check_cuda.faults_in_sass(f"Function : one\n{reciprocal}"))
    assert list(check_cuda.faults_in_sass(f"Function : one\n{reciprocal}FFMA R1, R2, R3, R4 ;\n"))
    assert list(check_cuda.faults_in_sass("Function : one\nSTL [R1], R2 ;\n"))


def test_without_nvcc_the_status_says_so(tmp_path: Path) -> None:
    argv = [sys.executable, "-S", str(SCRIPT)]
    done = subprocess.run(argv, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    if check_cuda.find_tool("nvcc") != shutil.which("nvcc"):
        pytest.skip("this Python has an nvcc among its packages")
    assert (done.returncode, done.stdout.split()[:2]) == (check_cuda.NO_NVCC, ["no", "nvcc"])


@pytest.mark.long
@pytest.mark.skipif(check_cuda.find_tool("nvcc") is None, reason="there is no nvcc")
def test_the_kernels_compile_without_spills_or_anything_that_would_change_a_result() -> None:
    assert check_cuda.main([]) == 0
