"""A real GPT on one GPU: every stage a process of its own, on the emulated network, raw beside AQ-SGD.

    python benchmarks/bench_gpu_pipeline.py             GPT-2 XL, 8 stages, 10 Gbit/s, 500 and 100 Mbit/s, bf16
    python benchmarks/bench_gpu_pipeline.py --device cpu --model gpt_tiny --stages 4 --dtype fp32

Layers, optimizer, codecs and transport are real, and nothing is slowed. The stages share the GPU, so that computing
takes as long as all of them together: a step at 10 Gbit/s is about that, and what a slow network adds is its own. Every
system is a run of its own; a step is the median of its steps without the first two (in the first, samples are seen for
the first time). Where no private namespaces can be made it says so, and uses the machine's own loopback once, unshaped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_job
from emulated_job import EmulatedJob
from harness import RESULTS, append_result, exit_with, spread, text_of
from network_setting import System, flops_per_s, parse_systems, uplinks_topology
from wantrain.errors import ConfigError
from wantrain.model_config import ModelConfig
from wantrain.netem.sandbox import why_no_sandbox
from wantrain.profile import gpt_profile
from wantrain.resources import find_config
from wantrain.scheduler.solve import make_plan
from wantrain.training.device import open_device
from wantrain.units import format_bandwidth, format_time, parse_bytes_per_s

NAME = "gpu_pipeline"


def jobs(args: argparse.Namespace) -> Iterator[tuple[System, float, EmulatedJob]]:
    """Yield what is to run: system, uplink in bytes per second, job."""
    config = ModelConfig.load(find_config("models", args.model, ConfigError))
    profile = gpt_profile(config, 1)
    device = open_device(args.device, "this machine", "choose another --device")
    for uplink in map(parse_bytes_per_s, args.uplinks.split(",")):
        topology = uplinks_topology(args.stages, uplink, args.latency_ms / 1e3, flops_per_s=flops_per_s())
        for system in parse_systems(args.systems):
            plan = make_plan(
                topology, profile, batch_size=args.microbatches, num_stages=args.stages, num_replicas=1,
                forward_codec=system.forward, backward_codec=system.backward,
            )  # fmt: skip
            shape = (config.seq_len, config.hidden)
            yield system, uplink, EmulatedJob(
                plan, topology, profile, shape, args.steps, 1.0, config, device=device.type, dtype=args.dtype,
                is_shaped=args.is_shaped,
            )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run and keep every system on every network."""
    for system, uplink, job in jobs(args):
        if not system.is_own:
            raise ConfigError(f"'{system.name}' isn't wantrain's; bench_network.py runs others, on emulated layers")
        measured = emulated_job.run(job)
        step_s = spread(measured.settled_s)
        network = format_bandwidth(uplink) if args.is_shaped else "loopback, unshaped"
        tokens = args.microbatches * job.sample_shape[0] / step_s["median"]
        low, middle, high = (format_time(step_s[key]) for key in ("min", "median", "max"))
        print(f"{network:<20} {system.name:<40} {middle:>8} ({low} – {high})   {tokens:,.0f} tokens/s", flush=True)
        work = {"model": args.model, "stages": args.stages, "microbatches": args.microbatches, "dtype": args.dtype}
        record: dict[str, Any] = {
            "benchmark": NAME,
            "emulated": "network" if args.is_shaped else "nothing",
            "network": network,
        }
        record |= {"system": system.name, "first_s": measured.steps_s[0], "step_s": step_s, "device": args.device}
        append_result(NAME, record | work | _gpu(args.device), args.out)


def _gpu(device: str) -> dict[str, Any]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_xl", help="the GPT to train (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=8, help="a process each (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=32, help="of one sample (default: %(default)s)")
    parser.add_argument(
        "--uplinks",
        type=text_of(parse_bytes_per_s),
        default="10 Gbit/s,500 Mbit/s,100 Mbit/s",
        help="default: %(default)s",
    )
    parser.add_argument("--latency-ms", type=float, default=1.0, help="one way, between any two (default: %(default)s)")
    parser.add_argument("--systems", default="raw,aqsgd,aqsgd:3/quantized:6", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="of a run (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where results are kept")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("the first two steps don't count; give at least three")
    reason = why_no_sandbox()
    args.is_shaped = reason is None
    if reason:
        print(f"no emulated network here ({reason}); on this machine's own loopback instead, unshaped", flush=True)
        args.uplinks = args.uplinks.split(",")[0]
    run(args)


if __name__ == "__main__":
    exit_with(main)
