"""The kernels on one processor core: first whether they give the bytes of the reference, then their speed.

    python benchmarks/bench_kernels_cpu.py              one activation of GPT-2 XL, 1 × 1024 × 1600 fp32 values
    python benchmarks/bench_kernels_cpu.py --smoke      tiny: shows that this program works

What is timed is checked on the same tensors before, and nothing is timed where a byte differs. Time is that of the
processor, so that other programs can only lengthen it (by cache, memory and shared cores), never shorten it; of some
rounds over all operations the one with the best median stands for each. Beside it stands a `copy_` of the same tensor
in the same round: as many values read and written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wantrain_kernels as wk
from bench_kernels import differences
from harness import RESULTS, append_result, spread

SHAPE = (1, 1024, 1600)
SMOKE_SHAPE = (1, 8, 1600)
GROUP_SIZE = 128
KEY = 0x5EED_5EED_5EED


@dataclass(frozen=True)
class Operation:
    """What is timed, by name and number of bits."""

    name: str
    bits: int
    run: Callable[[], object]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny and short")
    parser.add_argument("--backend", default="cpu", help="cpu (default) or reference")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls of each operation in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default: results)")
    return parser.parse_args(argv)


def operations(x: Tensor, backend: str) -> list[Operation]:
    """Return every operation on the tensor: at 4 bits all, at others those that a step has most of."""
    made = [one for bits in (4, 2, 3, 6, 8) for one in hot_operations(x, bits, backend)]
    options: dict[str, Any] = {"group_size": GROUP_SIZE, "backend": backend}
    rotated = wk.hadamard_quantize(x, 4, key=KEY, **options)
    half, base = x.bfloat16(), stored(x, "bf16", options)
    made += [
        Operation("quantize, stochastic", 4, lambda: wk.quantize(x, 4, rounding="stochastic", key=KEY, **options)),
        Operation("quantize, bf16 input", 4, lambda: wk.quantize(half, 4, **options)),
        Operation("hadamard_quantize", 4, lambda: wk.hadamard_quantize(x, 4, key=KEY, **options)),
        Operation(
            "hadamard_dequantize", 4, lambda: wk.hadamard_dequantize(rotated, x.shape, x.dtype, 4, key=KEY, **options)
        ),
        Operation("base_store", 16, lambda: wk.base_store(x, base, **options)),
        Operation("base_load", 16, lambda: wk.base_load(base, x.shape, x.dtype, **options)),
    ]
    return made + [one for base_format in ("fp16", "q8", "q4") for one in delta_operations(x, 4, base_format, options)]


def hot_operations(x: Tensor, bits: int, backend: str) -> list[Operation]:
    options: dict[str, Any] = {"group_size": GROUP_SIZE, "backend": backend}
    body = wk.quantize(x, bits, **options)
    return [
        Operation("quantize", bits, lambda: wk.quantize(x, bits, **options)),
        Operation("dequantize", bits, lambda: wk.dequantize(body, x.shape, x.dtype, bits, **options)),
        *delta_operations(x, bits, "bf16", options),
    ]


def delta_operations(x: Tensor, bits: int, base_format: str, options: dict[str, Any]) -> list[Operation]:
    base, named = stored(x * 0.9, base_format, options), options | {"base_format": base_format}
    body = wk.quantize(x * 0.1, bits, **options)
    suffix = "" if base_format == "bf16" else f", {base_format}"
    return [
        Operation("delta_encode" + suffix, bits, lambda: wk.delta_encode(x, base, bits, **named)),
        Operation("delta_decode" + suffix, bits, lambda: wk.delta_decode(body, base, x.shape, x.dtype, bits, **named)),
    ]


def stored(x: Tensor, base_format: str, options: dict[str, Any]) -> Tensor:
    """Return a message that holds x."""
    base = torch.empty(wk.base_bytes(x.shape, base_format, GROUP_SIZE), dtype=torch.uint8)
    wk.base_store(x, base, base_format=base_format, **options)
    return base


def wrong(x: Tensor, backend: str) -> list[str]:
    """Name what is not as the reference has it, on the tensor that is timed."""
    forms = {2: "bf16", 3: "fp16", 4: "bf16", 6: "q4", 8: "q8"}
    names = [
        name
        for bits, base_format in forms.items()
        for name in differences(backend, x.device, x, x * 0.9, bits, base_format, "nearest")
    ]
    names += differences(backend, x.device, x, x * 0.9, 4, "bf16", "stochastic")
    return names + list(differences(backend, x.device, x.bfloat16(), x.bfloat16() * 0.9, 4, "bf16", "nearest"))


def rates(run: Callable[[], object], num_values: int, repeats: int) -> list[float]:
    """Return millions of values per second of processor time, of some calls after a first."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.thread_time()
        run()
        seconds.append(time.thread_time() - began)
    return [num_values / max(one, 1e-9) / 1e6 for one in seconds]


def measure(x: Tensor, timed: list[Operation], repeats: int, rounds: int) -> list[dict[str, Any]]:
    """Return for each operation the round with the best median, with the copy of that round."""
    target, best = torch.empty_like(x), list[dict[str, Any]]()
    for _ in range(rounds):
        copied = spread(rates(lambda: target.copy_(x), x.numel(), repeats))["median"]
        rows = [
            {"operation": one.name, "bits": one.bits, "copy_m_values_per_s": copied}
            | {"m_values_per_s": spread(rates(one.run, x.numel(), repeats)), "load": os.getloadavg()[0]}
            for one in timed
        ]
        best = [max(pair, key=median_of) for pair in zip(best, rows, strict=True)] if best else rows
    return best


def median_of(row: dict[str, Any]) -> float:
    return float(row["m_values_per_s"]["median"])


def show(row: dict[str, Any]) -> str:
    rate, copied = row["m_values_per_s"], row["copy_m_values_per_s"]
    return (
        f"{row['operation']:22} {row['bits']:2} bits {rate['median']:7.0f} M values/s "
        f"({rate['min']:.0f} to {rate['max']:.0f}), copy {copied:.0f}, load {row['load']:.1f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, keep; return 1 where a byte differs."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    shape = SMOKE_SHAPE if arguments.smoke else SHAPE
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = wrong(x, arguments.backend)
    if names:
        print(f"{arguments.backend}: NOT the bytes of the reference", *names, sep="\n    ")
        return 1
    rounds, repeats = (1, 3) if arguments.smoke else (arguments.rounds, arguments.repeats)
    rows = measure(x, operations(x, arguments.backend), repeats, rounds)
    print(f"{arguments.backend}: the bytes of the reference; {tuple(shape)} fp32, groups of {GROUP_SIZE}, one core")
    print(*map(show, rows), sep="\n")
    record = {"backend": arguments.backend, "shape": list(shape), "group_size": GROUP_SIZE, "rows": rows}
    print("kept in", append_result("kernels_cpu", record | {"repeats": repeats, "rounds": rounds}, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
