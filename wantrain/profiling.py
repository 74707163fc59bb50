"""`wantrain profile`: measure what this machine computes with, or the links between all workers.

    wantrain profile --model M --out F                        layers, codecs, memory of this machine → a profile
    wantrain profile --model M --like DEVICE --out F          the same from published figures
    torchrun … -m wantrain profile --links --out T            every link and shared line → a topology

With both --model and --links every worker measures its layers first, and the topology holds its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wantrain.device_speed import derived_profile, shipped_devices
from wantrain.errors import ConfigError
from wantrain.fact import write_text
from wantrain.hf_model import load_model
from wantrain.probe.machine import free_memory_bytes, processor_name
from wantrain.probe.measurement import Participant
from wantrain.probe.session import Place, measure_network, worker_name
from wantrain.probe.table import as_json, table_lines
from wantrain.probe.topology_text import flops_text, topology_text
from wantrain.profile import ModelProfile
from wantrain.units import format_bytes, format_time, parse_flops_per_s

if TYPE_CHECKING:
    import torch

    from wantrain.training.layer_profiler import LayerMeasurement

_WHOSE_DEVICE = ("this machine", "choose another --device")


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain profile`."""
    if args.links:
        return _profile_links(args)
    if args.model is None:
        raise ConfigError("nothing to measure; give --model M, or start every worker with --links")
    if args.like is not None:
        device = shipped_devices().device(args.like)
        profile = derived_profile(load_model(args.model), args.microbatch_size, device)
        lines = [*_profile_lines(profile)]
    else:
        with _progress() as progress:
            measured = _measure_machine(args, progress)
        profile = measured.profile
        lines = [*_layer_lines(measured), *_profile_lines(profile)]
    if args.out is not None:
        profile.save(args.out)
    print(profile.model_dump_json(indent=2) if args.json else "\n".join([*lines, *_written(args)]))
    return 0


def _measure_machine(args: argparse.Namespace, progress: Callable[[str], None]) -> LayerMeasurement:
    """Measure layers, codecs and free memory with the threads that a run would have."""
    import torch

    from wantrain.training.codec_profiler import measure_codecs
    from wantrain.training.device import open_device
    from wantrain.training.layer_profiler import measure_layers

    config = load_model(args.model)
    torch.set_num_threads(args.threads)
    device = open_device(args.device, *_WHOSE_DEVICE)
    memory_bytes = _free_bytes(args.device)
    source = _source(args, device)
    try:
        measured = measure_layers(
            config, args.microbatch_size, device=device, source=source, dtype=args.dtype, dilation=args.dilation,
            progress=progress,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise ConfigError(
            f"a microbatch of {args.microbatch_size} does not fit into the memory of {device}"
            f" ({format_bytes(memory_bytes)} free); measure a smaller one with --microbatch-size"
        ) from None
    progress("codecs")
    update = {"codec_speed": measure_codecs(device), "memory_bytes": memory_bytes}
    return type(measured)(measured.profile.model_copy(update=update), measured.times, measured.num_rounds)


def _free_bytes(name: str) -> int:
    """Return what is free on a device; a processor's is known without torch."""
    if name == "cpu":
        return free_memory_bytes()
    import torch

    from wantrain.training.device import open_device

    device = open_device(name, *_WHOSE_DEVICE)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory_bytes()


def _source(args: argparse.Namespace, device: torch.device) -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    return f"measured on {name}, {threads}, {args.dtype}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"


def _layer_lines(measured: LayerMeasurement) -> Iterator[str]:
    """Yield the kinds of layers: median seconds, how far they spread, bytes."""
    yield f"{'layer':<12}{'forward':>11}{'backward':>11}{'spread':>9}{'kept':>11}{'weights':>11}"
    speed = measured.profile.reference_flops_per_s
    assert speed is not None
    shown = {"embedding": 0, "block": 1, "head": measured.profile.num_layers - 1}
    for kind, index in shown.items():
        layer = measured.profile.layers[index]
        seconds = f"{format_time(layer.forward_s(speed)):>11}{format_time(layer.backward_s(speed)):>11}"
        sizes = f"{format_bytes(layer.stored_bytes):>11}{format_bytes(layer.parameter_bytes):>11}"
        yield f"{kind:<12}{seconds}{measured.times[kind].spread:>8.1%} {sizes}"
    yield f"medians of {measured.num_rounds} rounds; spread: half of the range of the middle half"


def _profile_lines(profile: ModelProfile) -> Iterator[str]:
    """Yield where the figures come from, and what to write into a topology."""
    yield profile.source
    codec = profile.codec_speed
    if codec is not None:
        speeds = ("direct_encode", "direct_decode", "delta_encode", "delta_decode")
        yield "codecs, million values/s: " + ", ".join(
            f"{name.replace('_', ' ')} {getattr(codec, name) / 1e6:.0f}" for name in speeds
        )
    yield "for the topology's [[worker]]: " + ", ".join(_worker_keys(profile))


def _worker_keys(profile: ModelProfile) -> Iterator[str]:
    if profile.reference_flops_per_s is not None:
        yield f'flops = "{flops_text(profile.reference_flops_per_s)}"'
    if profile.memory_bytes is not None:
        yield f'memory = "{profile.memory_bytes / 1e9:.4g} GB"'
    if profile.codec_speed is not None:
        yield f"codec_speed = {profile.codec_speed.values_per_s:.4g}"


def _written(args: argparse.Namespace) -> list[str]:
    return [] if args.out is None else [f"written to {args.out}"]


def _profile_links(args: argparse.Namespace) -> int:
    """Take part in measuring the links; rank 0 prints and writes."""
    place = Place.from_environment()
    with _progress() as progress:
        compute = None if args.model is None else lambda: _computing(_measure_machine(args, lambda _: None).profile)
        made = measure_network(_own(args), place, args.timeout, progress, compute)
    if made is None:
        return 0
    out = args.out or "topology.toml"
    text = topology_text(made, "measured", _links_source(args.dilation), args.dilation)
    write_text(out, text)
    if args.json:
        print(json.dumps(as_json(made, args.dilation)))
    else:
        print("\n".join([*table_lines(made, args.dilation), f"written to {out}"]))
    return 0


def _own(args: argparse.Namespace) -> Participant:
    """Return who this worker is, and what is known of it without measuring."""
    known = {} if args.profile is None else _computing(ModelProfile.load(args.profile))
    if args.flops is not None:
        known["flops_per_s"] = _speed(args.flops)
    memory_bytes = known.pop("memory_bytes", None) or _free_bytes(args.device)
    return Participant(
        args.worker or worker_name(),
        args.site or os.environ.get("WANTRAIN_SITE", ""),
        device=args.device,
        memory_bytes=memory_bytes,
        **known,
    )


def _computing(profile: ModelProfile) -> dict[str, Any]:
    """Return what a topology says of a worker's computing."""
    return {
        "flops_per_s": profile.reference_flops_per_s,
        "codec_values_per_s": None if profile.codec_speed is None else profile.codec_speed.values_per_s,
        "memory_bytes": profile.memory_bytes,
    }


def _speed(text: str) -> float:
    try:
        return parse_flops_per_s(text)
    except ValueError as caught:
        raise ConfigError(f"--flops: {caught}") from None


def _links_source(dilation: float) -> str:
    slowed = "" if dilation == 1 else f", the network slowed down {dilation:g} times"
    return f"wantrain profile --links, {datetime.now(UTC):%Y-%m-%d}: pairs in rounds, each way by itself{slowed}"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is being done: one line that changes, or a line for each phase in a log."""
    phases: list[str] = []

    def show(text: str) -> None:
        phase = text.partition(",")[0]
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif phase not in phases:
            phases.append(phase)
            print(phase, file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
