"""Be one rank of a pipeline's benchmark: systems take turns, step by step, on the network that is there.

    python benchmarks/pipeline_turns.py --uplink "500 Mbit/s" --network net.toml        only writes the network
    wantrain emulate net.toml --dilation 4 -- \\
        python benchmarks/pipeline_turns.py --uplink "500 Mbit/s" --dilation 4 --systems "torch 1F1B,raw,aqsgd"

Rank 0 prints a line of JSON for every step: undilated seconds from the common begin to the last rank's end, and what
all ranks' processors did meanwhile (undilated: sleeping layers take next to none, so it is codec, transport and
schedule). With a system's last step comes when each rank computed. The first steps are warm-up: with a codec that
remembers, the first one is the samples' first visit. `bench_network.py` starts this with networks that it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from network_setting import Setting, System, parse_systems
from wantrain.units import parse_bytes_per_s, parse_time_s

_FIRST_PORT = 29501
_AHEAD_S = 0.05
"""Chosen: what a rank needs to hear of a common begin besides the network's latency."""


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what describes the work of a step."""
    parser.add_argument("--model", default="gpt2_xl", help="whose layers are slept (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=8, help="one worker each (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=16, help="of one sample (default: %(default)s)")
    parser.add_argument("--warmups", type=int, default=1, help="steps before those that count")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each system (default: %(default)s)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--uplink", default="500 Mbit/s", help="of every worker (default: %(default)s)")
    parser.add_argument("--latency", default="0 ms", help="one way, between any two (default: %(default)s)")
    parser.add_argument("--dilation", type=float, default=4.0, help="the emulated network's")
    parser.add_argument("--systems", default="raw", help="comma separated; see bench_network.py")
    parser.add_argument("--network", type=Path, help="write the network to this file, and do nothing else")
    return parser.parse_args()


class Step(NamedTuple):
    """What one rank says of a step, on the machine's clock and of its own processor."""

    begin_s: float
    end_s: float
    processor_s: float
    coding_s: float


def make_pipeline(system: System, setting: Setting, rank: int) -> Any:
    """Return a system's pipeline on this rank, ready to step."""
    if system.is_own:
        from wantrain_pipeline import WantrainPipeline

        return WantrainPipeline(system, setting, rank)
    if system.schedule == "DeepSpeed":
        from peers.deepspeed_pipeline import DeepSpeedPipeline

        return DeepSpeedPipeline(system, setting, rank)
    from peers.torch_pipeline import TorchPipeline

    return TorchPipeline(system, setting, rank)


def take_turn(pipeline: Any, setting: Setting, group: Any) -> list[Step]:
    """Play one step from a begin that all ranks agree on; return what every rank says of it."""
    import torch
    import torch.distributed as dist

    dist.barrier(group)
    begin = torch.tensor([time.monotonic() + _AHEAD_S + 2 * setting.latency_s * setting.dilation], dtype=torch.float64)
    dist.broadcast(begin, 0, group)
    time.sleep(max(0.0, begin.item() - time.monotonic()))
    processor_s = time.process_time()
    pipeline.step()
    own = Step(begin.item(), time.monotonic(), time.process_time() - processor_s, pipeline.coding_s)
    said = [torch.empty(len(own), dtype=torch.float64) for _ in range(setting.stages)]
    dist.all_gather(said, torch.tensor(own, dtype=torch.float64), group)
    return [Step(*one.tolist()) for one in said]


def work(args: argparse.Namespace, setting: Setting) -> None:
    """Set up all systems, let them take turns, and print their steps on rank 0."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    dist.init_process_group("gloo", f"tcp://{address}:{_FIRST_PORT}", rank=rank, world_size=setting.stages)
    group = dist.new_group()
    pipelines = {}
    for i, system in enumerate(parse_systems(args.systems)):
        os.environ["MASTER_PORT"] = str(_FIRST_PORT + 1 + i)
        pipelines[system] = make_pipeline(system, setting, rank)
    for turn in range(-args.warmups, args.repeats):
        for system, pipeline in pipelines.items():
            steps = take_turn(pipeline, setting, group)
            worked: list[Any] = [None] * setting.stages if rank == 0 else []
            own = pipeline.worked(steps[rank].begin_s)
            if turn == args.repeats - 1:
                dist.gather_object(own, worked if rank == 0 else None, group=group)
            if rank == 0:
                print(json.dumps(_said(system.name, turn, steps, setting, worked)), flush=True)
    for pipeline in pipelines.values():
        pipeline.close()
    dist.destroy_process_group()


def _said(name: str, turn: int, steps: list[Step], setting: Setting, worked: list[Any]) -> dict[str, Any]:
    said = {
        "system": name,
        "turn": turn,
        "step_s": (max(step.end_s for step in steps) - steps[0].begin_s) / setting.dilation,
        "processor_s": [round(step.processor_s, 4) for step in steps],
        "coding_s": [round(step.coding_s, 4) for step in steps],
    }
    if worked[0] is not None:
        said["worked"] = [[(kind, round(a, 4), round(b, 4)) for kind, a, b in one] for one in worked]
    return said


def main() -> None:
    args = parse_arguments()
    setting = Setting(
        parse_bytes_per_s(args.uplink), parse_time_s(args.latency), args.model, args.stages, args.microbatches,
        args.dilation,
    )  # fmt: skip
    if args.network:
        args.network.write_text(setting.topology_text(), encoding="utf-8")
    else:
        work(args, setting)


if __name__ == "__main__":
    main()
