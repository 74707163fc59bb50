"""Compile the Triton kernels without a GPU, and look at what came out: `python kernels/check_triton.py`.

For every kernel: registers, spills, shared memory, and machine instructions per value in its loop: above about 55, and
not memory but the multiprocessors set the pace of an H200 (132 of them at 1.98 GHz, 128 instructions each, against 85 %
of 4.3 TB/s in 6.3 bytes per value). What would break equality with the reference must not be in the PTX, see
`check_cuda`. Triton brings ptxas and cuobjdump along.

Exit status: 0 all is well, 1 something is wrong, 77 there is no Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from check_cuda import faults_in_ptx

NO_TRITON = 77
ARCHITECTURE = 90
_POINTERS = {"body": "*u8", "base": "*u8", "digest": "*i64", "word": "*i64"}


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel."""

    title: str
    kernel: str
    constants: dict[str, Any]
    dtype: str = "bf16"
    row_length: int = 1024
    group_size: int = 128


@dataclass(frozen=True)
class Compiled:
    """What came out."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions_per_value: float
    faults: list[str] = field(default_factory=list)


def variants() -> Iterator[Variant]:
    """Yield what is worth a look: every width of every operation, then one change at a time."""
    for bits in (2, 3, 4, 6, 8):
        yield Variant(f"delta_encode {bits} bits", "encode_kernel", _encode(bits))
        yield Variant(f"delta_decode {bits} bits", "decode_kernel", _decode(bits))
        yield Variant(f"quantize {bits} bits", "encode_kernel", _encode(bits, BASE="none"))
        yield Variant(f"dequantize {bits} bits", "decode_kernel", _decode(bits, BASE="none"))
    yield Variant("hadamard_quantize 4 bits", "encode_kernel", _encode(4, BASE="none", ROTATE=True))
    yield Variant("hadamard_dequantize 4 bits", "decode_kernel", _decode(4, BASE="none", ROTATE=True))
    for base in ("bf16", "fp16", "q8", "q4"):
        yield Variant(f"base_store {base}", "store_kernel", {"BASE": base})
        yield Variant(f"base_load {base}", "load_kernel", {"BASE": base})
        if base != "bf16":
            yield Variant(f"delta_encode 4 bits, base {base}", "encode_kernel", _encode(4, BASE=base))
            yield Variant(f"delta_decode 4 bits, base {base}", "decode_kernel", _decode(4, BASE=base))
    for name, constants in (("encode", _encode(4)), ("decode", _decode(4))):
        title, kernel = f"delta_{name} 4 bits", f"{name}_kernel"
        yield Variant(f"{title}, fp32", kernel, constants, dtype="fp32")
        yield Variant(f"{title}, rows of whole octets", kernel, constants, row_length=1600)
        yield Variant(f"{title}, rows of any length", kernel, constants, row_length=1601)
        for group_size in (32, 256):
            yield Variant(f"{title}, group {group_size}", kernel, constants, group_size=group_size)
    yield Variant("delta_encode 4 bits, stochastic", "encode_kernel", _encode(4, STOCHASTIC=True))
    yield Variant("delta_encode 4 bits, saturate", "encode_kernel", _encode(4, SATURATE=True))


def _encode(bits: int, **changed: Any) -> dict[str, Any]:
    return {"BITS": bits, "BASE": "bf16", "STOCHASTIC": False, "SATURATE": False, "ROTATE": False} | changed


def _decode(bits: int, **changed: Any) -> dict[str, Any]:
    return {"BITS": bits, "BASE": "bf16", "ROTATE": False} | changed


def compile_variant(variant: Variant) -> Compiled:
    """Compile for the architecture as `triton_ops` launches it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wantrain_kernels import triton_kernels, triton_ops
    from wantrain_kernels.layout import Layout

    layout = Layout(64, variant.row_length, variant.constants.get("BITS", 8), variant.group_size)
    constants = variant.constants | triton_ops.shape_constants(layout)
    kernel = getattr(triton_kernels, variant.kernel)
    source = ASTSource(kernel, *_arguments(kernel.arg_names, constants, variant.dtype))
    made = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=triton_ops.OPTIONS)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage, sass = _disassemble(made.asm["cubin"], tools)
    values_per_thread = triton_ops.TILE_VALUES // (32 * int(triton_ops.OPTIONS["num_warps"]))
    return Compiled(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=made.metadata.shared,
        instructions_per_value=loop_length(sass) / values_per_thread,
        faults=list(faults_in_ptx(made.asm["ptx"])),
    )


def _arguments(
    names: list[str], constants: dict[str, Any], dtype: str
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Return the types of a kernel's arguments, its constants, and which pointers are aligned to 16 bytes."""
    pointers = _POINTERS | {"x": f"*{dtype}", "out": f"*{dtype}"}
    if constants["BASE"] == "none":
        constants = constants | {"base": None, "digest": None, "word": None}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    return signature, constants, aligned


def _disassemble(cubin: bytes, tools: Path) -> tuple[dict[str, int], str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        argv = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(path)]
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}, text


def loop_length(sass: str) -> int:
    """Return how many instructions lie within the longest backward jump."""
    addresses = [int(found[1], 16) for found in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+[^;/]+;", sass)]
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/\s+[^;/]*\bBRA[^;/]*?0x([0-9a-f]+)[^;/]*;", sass)
    loops = [(int(to, 16), int(at, 16)) for at, to in jumps if int(to, 16) < int(at, 16)]
    return max((sum(to <= address <= at for address in addresses) for to, at in loops), default=0)


def main(titles: list[str]) -> int:
    """Compile all variants, or those whose title holds one of the given words, and print a line for each."""
    if importlib.util.find_spec("triton") is None:
        print("there is no Triton; pip install triton")
        return NO_TRITON
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = [variant for variant in variants() if not titles or any(title in variant.title for title in titles)]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(compile_variant, chosen))
    print(f"{'sm_' + str(ARCHITECTURE):42} registers  spilled  shared  instructions/value")
    for variant, made in zip(chosen, results, strict=True):
        numbers = f"{made.registers:9} {made.spilled_bytes:8} {made.shared_bytes:7} {made.instructions_per_value:19.1f}"
        print(f"{variant.title:42} {numbers}")
        for fault in made.faults:
            print(f"    WRONG: {fault}")
    return int(any(made.faults or made.spilled_bytes for made in results) or not results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
