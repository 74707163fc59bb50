"""Compile the CUDA kernels without a GPU, and look at what came out: `python kernels/check_cuda.py`.

For every kernel: registers, spills, shared memory. And what would break equality with the reference on a GPU, which no
test here can see, must not be there:

    PTX    a fused multiply-add, an approximate division, flushing to zero, a floating-point sum or product without a
           rounding of its own (ptxas may fuse those)
    SASS   fused multiply-adds beyond the two that a correctly rounded reciprocal consists of; local memory

nvcc is looked for on PATH and among this Python's packages (`pip install nvidia-cuda-nvcc nvidia-cuda-runtime
nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`: 13.5 was tried; 330 MB). Exit status: 0 all is well, 1 something is wrong,
77 there is no nvcc. SASS is looked at where there is a cuobjdump.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
NO_NVCC = 77
"""Chosen: what automake calls a skipped test."""

_FORBIDDEN_PTX = {
    "fused multiply-add": r"\bfma\.|\bmad\.\w*\.?f(?:16|32|64)",
    "approximate operation": r"\.approx|\bdiv\.full",
    "flush to zero": r"\.ftz",
    "sum or product without a rounding": r"\b(?:add|sub|mul)\.f32",
}
_PROPERTIES = re.compile(
    r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"[^\n]*\n[^\n]*Used (\d+) registers([^\n]*)"
)
_NAME = re.compile(r"(Encode|Decode)ILi(\d)ELNS_4TypeE(\d)ELS2_(\d)E((?:Lb\dE)+)E")
_TYPES = ("fp32", "bf16", "fp16", "-")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what ptxas says of it."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        found = _NAME.search(self.name)
        if found is None:
            return self.name
        kind, bits, values, base, flags = found.groups()
        *stochastic, aligned = (flag == "1" for flag in re.findall(r"Lb(\d)", flags))
        rounding = " stochastic" if any(stochastic) else ""
        access = "16 bytes at a time" if aligned else "piece by piece"
        return f"{kind} {bits} bits, {_TYPES[int(values)]}, base {_TYPES[int(base)]}{rounding}, {access}"


def find_tool(name: str) -> str | None:
    """Return the path of a CUDA program: on PATH, or installed beside this Python."""
    folders = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def compile_source(nvcc: str, source: Path, architecture: str, folder: Path) -> str:
    """Make PTX and cubin of a source in `folder`; return what ptxas said."""
    argv = [nvcc, "--options-file", str(SOURCES / "nvcc.flags"), f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
    argv += ["--keep", "--keep-dir", str(folder), "-o", str(folder / f"{source.stem}.cubin"), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernels_of(said: str) -> list[Kernel]:
    """Return the kernels that ptxas reported."""
    kernels = []
    for name, stack, stored, loaded, registers, rest in _PROPERTIES.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = max(int(stack), int(stored), int(loaded))
        kernels.append(Kernel(name, int(registers), spilled, int(shared[1]) if shared else 0))
    return [kernel for kernel in kernels if _NAME.search(kernel.name)]


def faults_in_ptx(text: str) -> Iterator[str]:
    """Name each kind of forbidden instruction in PTX."""
    for what, pattern in _FORBIDDEN_PTX.items():
        found = re.findall(rf"^.*(?:{pattern}).*$", text, re.MULTILINE)
        if found:
            yield f"{len(found)} × {what} in the PTX, first: {found[0].strip()}"


def faults_in_sass(text: str) -> Iterator[str]:
    """Name what a disassembly should not hold, kernel by kernel."""
    for part in text.split("Function : ")[1:]:
        counts = Counter(re.findall(r"\b(FFMA|DFMA|HFMA2|MUFU\.\w+|LDL|STL)\b", part))
        name = part.split(maxsplit=1)[0]
        if counts["FFMA"] > 2 * counts["MUFU.RCP"] or counts["DFMA"]:
            yield f"{counts['FFMA']} fused multiply-adds beside {counts['MUFU.RCP']} reciprocals in {name}"
        if counts["LDL"] or counts["STL"]:
            yield f"local memory in {name}"


def check(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[list[Kernel], list[str]]:
    """Compile a source; return its kernels and what is wrong."""
    kernels = kernels_of(compile_source(nvcc, source, architecture, folder))
    faults = [f"{kernel} spills {kernel.spilled_bytes} bytes" for kernel in kernels if kernel.spilled_bytes]
    faults += faults_in_ptx((folder / f"{source.stem}.ptx").read_text(encoding="utf-8"))
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is not None:
        argv = [cuobjdump, "--dump-sass", str(folder / f"{source.stem}.cubin")]
        faults += faults_in_sass(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return kernels, faults if kernels else [*faults, "no kernels"]


def report(source: Path, kernels: list[Kernel], faults: list[str], is_long: bool) -> None:
    """Print what was found in one source."""
    registers, shared = (max(values) for values in zip(*((k.registers, k.shared_bytes) for k in kernels), strict=True))
    spilled = max(kernel.spilled_bytes for kernel in kernels)
    print(f"{source.name:18} {len(kernels):3} kernels: {registers} registers, {spilled} bytes spilled, {shared} shared")
    for kernel in kernels if is_long else ():
        print(f"    {kernel}: {kernel.registers} registers")
    for fault in faults:
        print(f"    WRONG: {fault}")


def main(arguments: list[str]) -> int:
    """Check every source for sm_90, or the architecture given; `--long` prints a line for every kernel."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        print("no nvcc on PATH or among this Python's packages; pip install nvidia-cuda-nvcc nvidia-cuda-runtime")
        return NO_NVCC
    architecture = next((argument for argument in arguments if argument.startswith("sm_")), "sm_90")
    print(f"{nvcc}, {architecture}; SASS looked at: {'yes' if find_tool('cuobjdump') else 'no cuobjdump'}")
    sources = sorted(SOURCES.glob("*.cu"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [Path(name, source.stem) for source in sources]
        for folder in folders:
            folder.mkdir()
        results = list(
            pool.map(lambda job: check(nvcc, job[0], architecture, job[1]), zip(sources, folders, strict=True))
        )
    for source, (kernels, faults) in zip(sources, results, strict=True):
        report(source, kernels, faults, "--long" in arguments)
    return int(any(faults for _, faults in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
