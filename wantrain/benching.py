"""`wantrain bench`: the benchmark suite, by the names of its questions.

A benchmark is a program of its own in `benchmarks/`, which a wheel carries as `wantrain/benchmarks`; all that follows
its name goes on to it. In a checkout results are kept beside it, elsewhere in the folder `benchmarks` where one is.
"""

from __future__ import annotations

import argparse
import runpy
import sys

from wantrain.errors import ConfigError, did_you_mean
from wantrain.resources import benchmarks_folder

BENCHMARKS = {
    "network": ("bench_network", "what the network costs, and what compression buys back, beside other pipelines"),
    "data-parallel": ("bench_data_parallel", "what averaging gradients costs, beside torch's DDP and its hooks"),
    "scheduler": ("bench_scheduler", "how good the planner's plans are, and how fast it finds them"),
    "prediction": ("bench_prediction", "predicted beside measured, job by job"),
    "planning": ("bench_planning", "planned against naive placement, advice and break-even, measured"),
    "profile": ("bench_profile", "how near measured links come to a network that is known"),
    "published": ("bench_published", "what the simulator says of runs that others measured"),
    "slow-network": ("bench_slow_network", "what a worldwide network costs a plan, predicted"),
    "kernels": ("bench_kernels", "kernels on a GPU, against the bandwidth of a copy"),
    "gpu-pipeline": ("bench_gpu_pipeline", "a real GPT's stages sharing one GPU, over the emulated network"),
    "kernels-cpu": ("bench_kernels_cpu", "kernels on the processor, against the bandwidth of a copy"),
    "gradients": ("bench_gradients", "what compressing gradients costs a processor"),
    "buffer": ("bench_buffer", "what the message buffer's tiers carry"),
    "convergence": ("bench_convergence", "held-out losses with each codec, in real training"),
    "time-to-loss": ("bench_time_to_loss", "how soon a slow network reaches a loss, in real training"),
    "hooks": ("bench_hooks", "how soon torch's DDP reaches a loss with each hook, in real training"),
    "links": ("bench_links", "what a channel carries over one link; inside 'wantrain emulate'"),
}
"""By question: the program, and what it answers."""


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain bench`; a program that fails ends this one with its own status."""
    if args.question is None:
        width = max(map(len, BENCHMARKS))
        print("\n".join(f"wantrain bench {name:<{width}}  {what}" for name, (_, what) in BENCHMARKS.items()))
        return 0
    if args.question not in BENCHMARKS:
        raise ConfigError(
            f"there is no benchmark '{args.question}'{did_you_mean(args.question, BENCHMARKS)};"
            f" expected one of {', '.join(BENCHMARKS)}"
        )
    script = benchmarks_folder() / f"{BENCHMARKS[args.question][0]}.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *args.options]
    runpy.run_path(str(script), run_name="__main__")
    return 0
