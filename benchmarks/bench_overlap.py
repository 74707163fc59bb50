"""How close does a pipeline come to the bound of its network? wantrain beside torch's own, in the same run.

GPT-2 XL's shapes on eight stages: 16 microbatches of 1×1024×1600 fp32 (6.55 MB), compute emulated at 31 ms forward and
62 ms backward per stage and microbatch; every worker's uplink is shaped and shared by what it sends both ways. Systems
take turns step by step on the same standing network, with the same dilation. The bound is the work-conserving schedule
with everything overlapped and unlimited memory (`bound_s`).

    python benchmarks/bench_overlap.py --rates "500 Mbit/s" --dilation 4 --repeats 3
    python benchmarks/bench_overlap.py --rates "500 Mbit/s" --forward aqsgd:4 --backward quantized:8 --systems wantrain

With `aqsgd` the first warm-up step is the samples' first visit, and every timed step a later one. Codecs work
undilated; the processor time of rank 0's is printed beside.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import append_result, spread
from wantrain.units import format_bandwidth, parse_bytes_per_s
from wantrain.wire import payload_bytes

SHAPE = (1, 1024, 1600)
FORWARD_S, BACKWARD_S = 0.031, 0.062
"""GPT-2 XL's six layers on a V100 in fp32, roughly."""

SYSTEMS = ("wantrain", "torch 1F1B", "torch GPipe")


def bound_s(stages: int, microbatches: int, forward_bytes: float, backward_bytes: float, bytes_per_s: float) -> float:
    """Return the step of a work-conserving schedule: stages do one thing at a time, backward first, sends leave a
    worker one after another as they are ready, memory is unlimited, latency is none."""
    here_f: list[set[int]] = [set(range(microbatches)), *(set() for _ in range(stages - 1))]
    here_b: list[set[int]] = [set() for _ in range(stages)]
    done_f, done_b, busy, up = [0] * stages, [0] * stages, [0.0] * stages, [0.0] * stages
    queue: list[tuple[float, int, int, tuple[set[int], int] | None]] = [(0.0, s, s, None) for s in range(stages)]
    order, end = stages, 0.0
    while queue:
        now, _, s, arrival = heapq.heappop(queue)
        if arrival is not None:
            arrival[0].add(arrival[1])
        if busy[s] > now:
            continue
        is_backward = done_b[s] in here_b[s]
        if not is_backward and (done_f[s] not in here_f[s] or done_f[s] == microbatches):
            continue
        m = done_b[s] if is_backward else done_f[s]
        busy[s] = now + (BACKWARD_S if is_backward else FORWARD_S)
        end = max(end, busy[s])
        done_b[s], done_f[s] = done_b[s] + is_backward, done_f[s] + (not is_backward)
        target = s - 1 if is_backward else s + 1
        if 0 <= target < stages:
            up[s] = max(busy[s], up[s]) + (backward_bytes if is_backward else forward_bytes) / bytes_per_s
            queue_item = (up[s], order, target, ((here_b if is_backward else here_f)[target], m))
            heapq.heappush(queue, queue_item)
        elif not is_backward:
            here_b[s].add(m)
        heapq.heappush(queue, (busy[s], order + 1, s, None))
        order += 2
    return end


def topology_text(stages: int, rate: str) -> str:
    """Return a topology of workers that share nothing but each its own uplink among its links."""
    return (
        f'source = "chosen"\n[[worker]]\nname = "w"\ncount = {stages}\nsite = "wan"\n'
        f'uplink = "{rate}"\n[[link]]\nwithin = "wan"\nbandwidth = "{rate}"\n'
    )


def make_wantrain(rank: int, args: argparse.Namespace) -> tuple[Callable[[], float], Callable[[], None]]:
    """Return wantrain's step on this rank, which returns its seconds of encoding and decoding, and what ends it."""
    import torch

    from wantrain.comm.groups import join
    from wantrain.pipeline.boundary_codecs import CodecSettings
    from wantrain.pipeline.connect import Connections
    from wantrain.pipeline.executor import Executor, Microbatch
    from wantrain.pipeline.recorder import Recorder
    from wantrain.pipeline.stage import EmulatedStage
    from wantrain.profile import LayerProfile, ModelProfile
    from wantrain.scheduler.solve import make_plan
    from wantrain.topology import DEFAULT_FLOPS_PER_S, Topology

    elements = SHAPE[0] * SHAPE[1] * SHAPE[2]
    layer = LayerProfile(
        name="stage", forward_flops=FORWARD_S * DEFAULT_FLOPS_PER_S, backward_flops=BACKWARD_S * DEFAULT_FLOPS_PER_S,
        parameter_bytes=0, activation_elements=elements, stored_bytes=4 * elements,
    )  # fmt: skip
    stages, microbatches, dilation = args.stages, args.microbatches, args.dilation
    profile = ModelProfile(microbatch_size=1, layers=(layer,) * stages)
    topology = Topology.load(args.topology)
    plan = make_plan(
        topology, profile, batch_size=microbatches, num_stages=stages, forward_codec=args.forward,
        backward_codec=args.backward,
    )  # fmt: skip
    membership = join(plan.world_size, rank, 120.0)
    recorder = Recorder(rank, dilation)
    settings = CodecSettings(sample_shape=SHAPE[1:])
    connections = Connections.open(plan, membership, recorder, 600.0, settings=settings)
    stage = EmulatedStage(FORWARD_S * dilation, BACKWARD_S * dilation, SHAPE, SHAPE if rank > 0 else ())
    executor = Executor(
        plan.actions(0)[rank], stage, recorder, upstream=connections.upstream, downstream=connections.downstream
    )
    tokens, targets = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    batch = [
        Microbatch([m], tokens if rank == 0 else None, targets if rank == stages - 1 else None)
        for m in range(microbatches)
    ]

    samples = list(range(microbatches))

    def step() -> float:
        recorder.begin_step()
        executor.play(batch, upcoming=samples)
        coding_s: float = recorder.seconds("encode", "decode") * dilation
        return coding_s

    def close() -> None:
        connections.close(120.0)
        membership.leave(120.0)

    return step, close


def work(args: argparse.Namespace) -> None:
    """Be one rank: run the systems in turn, print the timings on rank 0."""
    import torch
    import torch.distributed as dist

    from peers.torch_pipeline import TorchPipeline

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    os.environ["MASTER_PORT"] = "29501"
    step, close = make_wantrain(rank, args)
    steps: dict[str, Callable[[], float | None]] = {"wantrain": step}
    os.environ["MASTER_PORT"] = "29502"
    dist.init_process_group("gloo")
    for name in args.systems.split(","):
        if name != "wantrain":
            d = args.dilation
            steps[name] = TorchPipeline(
                name, rank, args.stages, args.microbatches, SHAPE, FORWARD_S * d, BACKWARD_S * d
            ).step
    timings: dict[str, list[float]] = {name: [] for name in args.systems.split(",")}
    for repeat in range(args.warmups + args.repeats):
        for name, values in timings.items():
            dist.barrier()
            began = time.monotonic()
            coding_s = steps[name]()
            dist.barrier()
            seconds = (time.monotonic() - began) / args.dilation
            if repeat >= args.warmups:
                values.append(seconds)
            if rank == 0:
                print(
                    json.dumps(
                        {"system": name, "repeat": repeat, "step_s": round(seconds, 4), "rank 0 coding_s": coding_s}
                    ),
                    file=sys.stderr,
                    flush=True,
                )
    close()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(timings), flush=True)


def measure(rate: str, dilation: float, systems: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Run all ranks inside an emulated network; return the seconds of each step by system."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as file:
        file.write(topology_text(args.stages, rate))
    command = [
        sys.executable, "-m", "wantrain", "emulate", file.name, "--dilation", str(dilation), "--",
        sys.executable, str(Path(__file__).resolve()), "--work", "--topology", file.name, "--dilation", str(dilation),
        "--systems", systems, "--stages", str(args.stages), "--microbatches", str(args.microbatches),
        "--forward", args.forward, "--backward", args.backward,
        "--repeats", str(args.repeats), "--warmups", str(args.warmups),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        os.unlink(file.name)
    printed = next(line for line in done.stdout.splitlines() if "| {" in line and '": [' in line)
    timings: dict[str, list[float]] = json.loads(printed[printed.index("{") :])
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="500 Mbit/s,100 Mbit/s,10 Gbit/s", help="uplinks, comma separated")
    parser.add_argument("--dilation", type=float, default=4.0)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--forward", default="raw:fp32", help="codec of activations")
    parser.add_argument("--backward", default="raw:fp32", help="codec of their gradients")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="keep no result")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--topology", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    for rate in args.rates.split(","):
        bytes_per_s = parse_bytes_per_s(rate)
        there, back = payload_bytes(args.forward, SHAPE), payload_bytes(args.backward, SHAPE)
        bound = bound_s(args.stages, args.microbatches, there, back, bytes_per_s)
        timings = measure(rate, args.dilation, args.systems, args)
        record = {
            "benchmark": "overlap", "uplink": format_bandwidth(bytes_per_s), "dilation": args.dilation,
            "stages": args.stages, "microbatches": args.microbatches, "bound_s": round(bound, 3),
            "codecs": {"forward": args.forward, "backward": args.backward},
            "emulated": "compute (31 ms forward, 62 ms backward) and network",
            "systems": {name: spread(values) for name, values in timings.items()},
        }  # fmt: skip
        if not args.smoke:
            append_result("overlap", record)
        print(f"{rate}, dilation {args.dilation:g}, bound {bound:.2f} s")
        for name, values in timings.items():
            one = spread(values)
            share = f"{bound / one['median']:.0%} of the bound"
            print(f"  {name:<12} {one['median']:7.2f} s  ({one['min']:.2f}–{one['max']:.2f})  {share}")


if __name__ == "__main__":
    main()
