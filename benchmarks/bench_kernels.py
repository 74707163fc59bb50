"""The kernels on a GPU: first whether they give the bytes of the reference, then how near they come to a copy.

    python benchmarks/bench_kernels.py                  all backends that are there, 64 Mi values
    python benchmarks/bench_kernels.py --check          only the equality
    python benchmarks/bench_kernels.py --interpret      tiny, in Triton's interpreter: shows that this program works

A backend whose check fails is not timed. Bytes are counted from the layout: what must be read and written once. Each
figure stands beside the bandwidth of a plain `copy_` that moves as many bytes, measured just before in the same way:
events around one launch, after a buffer larger than the L2 cache was rewritten, which also keeps the GPU busy until
launch and events are queued, so that no time of the host is counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wantrain_kernels as wk
from harness import RESULTS, append_result, spread
from wantrain_kernels import backends, layout_of

GROUP_SIZE = 128
SMALL = (1024, 1600)
"""One microbatch of GPT-2 XL."""

ROUNDINGS = ("nearest", "stochastic")

_FLUSH_BYTES = 1 << 30
"""Chosen: rewriting it takes an H200 a quarter of a millisecond, longer than the host needs for one operation."""


@dataclass(frozen=True)
class Operation:
    """What is timed."""

    name: str
    bits: int
    bytes_moved: int
    run: Callable[[], object]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the reference, time nothing")
    parser.add_argument("--interpret", action="store_true", help="tiny tensors in Triton's interpreter, on the CPU")
    parser.add_argument("--backends", default="triton,cuda", help="comma separated (default: triton,cuda)")
    parser.add_argument("--rows", type=int, default=1 << 16, help="of 1024 values (default: 65536)")
    parser.add_argument("--repeats", type=int, default=100, help="timed launches of each operation")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT", RESULTS), help="folder of the result ($OUT, or results)"
    )
    return parser.parse_args(argv)


def outcome(backend: str, x: Tensor, m: Tensor, bits: int, base_format: str, rounding: str) -> dict[str, Tensor]:
    """Return all that a sender and a receiver make of x after m."""
    stored = torch.empty(wk.base_bytes(x.shape, base_format, GROUP_SIZE), dtype=torch.uint8, device=x.device)
    options: dict[str, Any] = {"group_size": GROUP_SIZE, "backend": backend}
    made = {"stored digest": wk.base_store(m, stored, base_format=base_format, **options)}
    sent, received = stored.clone(), stored.clone()
    made["loaded"], _ = wk.base_load(stored, x.shape, x.dtype, base_format=base_format, **options)
    made["direct"] = wk.quantize(x, bits, rounding=rounding, key=1 << 40, **options)
    made["values"] = wk.dequantize(made["direct"], x.shape, x.dtype, bits, **options)
    made["rotated"] = wk.hadamard_quantize(x, bits, key=5, rounding=rounding, **options)
    made["turned back"] = wk.hadamard_dequantize(made["rotated"], x.shape, x.dtype, bits, key=5, **options)
    made["delta"], made["sent digest"] = wk.delta_encode(
        x, sent, bits, base_format=base_format, rounding=rounding, key=7, **options
    )
    made["y"], made["received digest"] = wk.delta_decode(
        made["delta"], received, x.shape, x.dtype, bits, base_format=base_format, **options
    )
    return made | {"stored": stored, "sent": sent, "received": received}


def sampled_differences(backend: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[str]:
    """Name what a backend makes on the device that the reference does not make on the CPU, for a few of all options."""
    generator = torch.Generator().manual_seed(0)
    for i, bits in enumerate(widths):
        shape = ((9, 1600), (2, 256), (3, 37))[i % 3]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i // 2 % 3]
        x, m = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        x[1, 5] = float("inf")
        yield from differences(
            backend, device, x, m, bits, ("q8", "bf16", "fp16", "q4")[i % 4], rounding=ROUNDINGS[i % 2]
        )


def differences(
    backend: str, device: torch.device, x: Tensor, m: Tensor, bits: int, base_format: str, rounding: str
) -> Iterator[str]:
    """Name what a backend makes on the device that the reference does not make where x is."""
    expected = outcome("reference", x, m, bits, base_format, rounding)
    got = outcome(backend, x.to(device), m.to(device), bits, base_format, rounding)
    for name, tensor in got.items():
        if not torch.equal(_bits(tensor), _bits(expected[name]).to(device)):
            yield f"{name}: {bits} bits, base {base_format}, {rounding}, {x.dtype} {tuple(x.shape)}"


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes; of NaN only that it is one, since a GPU and a CPU make different ones."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), float("nan"), tensor)
    return tensor.contiguous().view(torch.uint8)


def operations(backend: str, x: Tensor, bits: int) -> list[Operation]:
    """Return the operations on one tensor, with a message already stored."""
    options: dict[str, Any] = {"group_size": GROUP_SIZE, "backend": backend}
    base = torch.empty(wk.base_bytes(x.shape, "bf16", GROUP_SIZE), dtype=torch.uint8, device=x.device)
    wk.base_store(x * 0.9, base, **options)
    body = wk.quantize(x, bits, **options)
    values = x.numel() * x.element_size()
    packed = layout_of(x.shape, bits, GROUP_SIZE).body_bytes
    both = values + 2 * base.numel() + packed
    return [
        Operation("delta_encode", bits, both, lambda: wk.delta_encode(x, base, bits, **options)),
        Operation("delta_decode", bits, both, lambda: wk.delta_decode(body, base, x.shape, x.dtype, bits, **options)),
        Operation("quantize", bits, values + packed, lambda: wk.quantize(x, bits, **options)),
        Operation("dequantize", bits, values + packed, lambda: wk.dequantize(body, x.shape, x.dtype, bits, **options)),
    ]


def copy_of(num_bytes: int, device: torch.device) -> Operation:
    """Return a copy that reads and writes as many bytes together."""
    source, target = (torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return Operation("copy", 8, num_bytes, lambda: target.copy_(source))


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the times of some runs after a warm-up; on a GPU without the host's."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        return [_host_seconds(run) for _ in range(repeats)]
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
        end.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _host_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def num_launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels, copies and fills one run puts on the GPU; None where there is none."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.events() or []
    return sum(bool(event.device_type.name == "CUDA") for event in events)


def measure(operation: Operation, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time an operation and a copy of as many bytes."""
    copied = spread([1e6 * s for s in seconds_of(copy_of(operation.bytes_moved, device).run, device, repeats)])
    took = spread([1e6 * s for s in seconds_of(operation.run, device, repeats)])
    return {
        "operation": operation.name,
        "bits": operation.bits,
        "bytes": operation.bytes_moved,
        "us": took["median"],
        "us_min_max": [took["min"], took["max"]],
        "bytes_per_s": operation.bytes_moved / took["median"] * 1e6,
        "share_of_copy": copied["median"] / took["median"],
        "copy_us": copied["median"],
        "launches": num_launches(operation.run, device),
    }


def time_backend(backend: str, x: Tensor, widths: tuple[int, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row per width and operation on one tensor."""
    for bits in widths:
        for operation in operations(backend, x, bits):
            row = {"backend": backend, "shape": list(x.shape)} | measure(operation, x.device, repeats)
            print(
                f"{backend:7} {tuple(x.shape)!s:14} {row['operation']:13} {bits} bits {row['us']:10.1f} µs "
                f"{row['bytes_per_s'] / 1e12:6.2f} TB/s {100 * row['share_of_copy']:6.1f} % of copy "
                f"{row['launches']} launches",
                flush=True,
            )
            yield row


def why_not(backend: str, device: torch.device) -> str | None:
    """Return why a backend can't be tried."""
    try:
        backends.choose(backend, device)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def examine(
    backend: str, device: torch.device, arguments: argparse.Namespace
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what is wrong with a backend, and if nothing is, its times."""
    checked, timed = ((2, 8), (4,)) if arguments.interpret else ((2, 3, 4, 6, 8), (2, 4, 8))
    shapes = ((2, 256),) if arguments.interpret else ((arguments.rows, 1024), SMALL)
    wrong = list(sampled_differences(backend, device, checked))
    table: list[dict[str, Any]] = []
    for shape in () if arguments.check else shapes:
        x = torch.randn(shape, device=device).to(torch.bfloat16)
        for bits in timed:
            wrong += differences(backend, device, x, x.flip(0), bits, "bf16", "nearest")
        if not wrong:
            table += time_backend(backend, x, timed, arguments.repeats)
    return wrong, table


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a backend that is there differs from the reference, 2 if none could be tried."""
    arguments = parse_arguments(argv)
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.interpret else "cpu")
    outcomes: list[bool] = []
    table: list[dict[str, Any]] = []
    for backend in arguments.backends.split(","):
        reason = why_not(backend, device)
        if reason is not None:
            print(f"{backend}: not tried: {reason}")
            continue
        wrong, rows = examine(backend, device, arguments)
        print("\n    ".join([f"{backend}: " + ("NOT " if wrong else "") + "the bytes of the reference", *wrong]))
        outcomes.append(not wrong)
        table += rows
    if table:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        record = {"gpu": gpu, "repeats": arguments.repeats, "table": table}
        print(f"added to {append_result('kernels_gpu', record, Path(arguments.out))}")
    if not outcomes:
        return 2
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
