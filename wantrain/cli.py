"""The command line: one entry per subcommand, and nothing heavy before it is known which one runs.

An entry names its handler as "module:function"; only the chosen one is imported, so that `--help` answers at once.
A handler takes the parsed arguments and returns the exit status. What the user should know about a failure is one line
on standard error; the status is the error's own (2: the input, 1: the run), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from wantrain.errors import WantrainError, did_you_mean

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


@dataclass(frozen=True)
class Subcommand:
    """One subcommand: what it is for, its arguments, and where the function is that carries it out."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    handler: str
    takes_command: bool = False

    def run(self, args: argparse.Namespace) -> int:
        """Import the handler and call it."""
        module, _, function = self.handler.partition(":")
        status: int = getattr(importlib.import_module(module), function)(args)
        return status


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wantrain: {message}; see '{self.prog} --help'\n")


def _dilation(text: str) -> float:
    """Parse a dilation: a number, at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"dilation must be a number, at least 1 (got {text!r})")
    return value


def _tolerance(text: str) -> float:
    """Parse a tolerance in percent: "10" → 0.1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a tolerance is a percentage above 0 (got {text!r})")
    return value / 100


def _rate_tolerance_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rate-tolerance",
        type=_tolerance,
        default="5",
        metavar="PERCENT",
        help="accept emulated rates this far from what was asked for (default: %(default)s)",
    )


def _emulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topology", metavar="TOPOLOGY", help="a TOML file, or the name of a shipped topology")
    parser.add_argument("--check", action="store_true", help="measure every pair and print asked beside measured")
    parser.add_argument("--dilation", type=_dilation, default=1.0, metavar="D", help="slow the network down D times")
    _rate_tolerance_argument(parser)
    parser.add_argument("--all-pairs", action="store_true", help="with --check: keep all pairs busy at once")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would be run, and run none")
    parser.add_argument("--only", metavar="WORKER", help="run CMD for this worker only, with the terminal to itself")
    parser.add_argument("--json", action="store_true", help="print results as JSON")


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key of the run file (training.steps=100); may be repeated",
    )


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a run file, or the name of a shipped one")
    _set_argument(parser)
    parser.add_argument("--topology", metavar="T", help="another topology than the run file's, by path or name")
    parser.add_argument("--data", metavar="PATH", help="train on this file or folder instead of the run file's text")
    parser.add_argument("--plan", metavar="PLAN", help="a plan to follow (default: one is made)")
    parser.add_argument("--run-dir", metavar="DIR", help="the run directory (default: below runs/)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in the run directory"
    )
    parser.add_argument("--dilation", type=_dilation, default=1.0, metavar="D", help="slow everything down D times")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a run file, the name of a shipped one, or a run's config.json"
    )
    _set_argument(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", default="run.toml", help="default: %(default)s")
    parser.add_argument(
        "--preset", metavar="NAME", default="demo", help="a shipped run file to begin from (default: demo)"
    )


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _job_arguments(parser)
    parser.add_argument("--worker", metavar="NAME", help="who this process is (default: by address and local rank)")


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    _job_arguments(parser)
    parser.add_argument(
        "--no-emulation", action="store_true", help="start the workers plainly, without a network between"
    )
    _rate_tolerance_argument(parser)
    parser.add_argument("--hosts", metavar="FILE", help="start them over SSH on the machines that this file names")
    parser.add_argument(
        "--insecure", action="store_true", help="with --hosts: accept public addresses without [wireguard]"
    )
    parser.add_argument("--inside", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="who starts the workers (default: this host)"
    )
    ray = parser.add_argument_group("with --engine ray, on a host that is part of the cluster")
    ray.add_argument("--address", metavar="A", help="the cluster's HOST:PORT (default: the one this host is part of)")
    ray.add_argument("--measure", metavar="FILE", help="measure the nodes' links first, and write the topology to FILE")
    ray.add_argument("--node-wait", type=_seconds, metavar="S", help="wait so long for a worker's node (default: 20)")
    ray.add_argument("--max-restarts", type=_whole, metavar="N", help="restarts where workers are lost (default: 3)")
    ray.add_argument(
        "--replan", action="store_true", default=None, help="make another plan where no node takes a worker's place"
    )


def _wireguard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hosts", metavar="HOSTS", help="a hosts file with [wireguard]")
    parser.add_argument(
        "--out", default="wireguard", metavar="DIR", help="write the files below this folder (default: %(default)s)"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a run file, or the name of a shipped one")
    _set_argument(parser)
    parser.add_argument("--topology", metavar="T", help="a topology, by path or name (default: the run file's)")
    parser.add_argument("--out", metavar="FILE", help="write the plan to this file")
    parser.add_argument("--commands", action="store_true", help="print the line to start on each host")
    parser.add_argument("--json", action="store_true", help="print the plan and all that was found about it as JSON")
    asked = parser.add_argument_group("without a run file")
    asked.add_argument("--model", metavar="M", help="a model's shape, by path or name")
    asked.add_argument("--profile", metavar="F", help="what its layers cost, as 'wantrain profile' measured it")
    asked.add_argument("--batch-size", type=_count, metavar="B", help="samples a step")
    asked.add_argument("--microbatch-size", type=_count, metavar="B", help="samples a microbatch (default: searched)")
    asked.add_argument("--stages", type=_count, metavar="N", help="stages of the pipeline (default: searched)")
    asked.add_argument("--replicas", type=_count, metavar="N", help="copies of the pipeline (default: searched)")
    asked.add_argument(
        "--schedule", choices=("1f1b", "gpipe", "zero_bubble"), help="in which order stages work (default: 1f1b)"
    )
    asked.add_argument(
        "--codec", metavar="C", help="auto, a codec for both ways, or FORWARD/BACKWARD (default: raw:fp32)"
    )
    asked.add_argument("--gradient-codec", metavar="C", help="codec of weight gradients (default: raw:fp32)")
    asked.add_argument("--data-seen", choices=("once", "again"), help="with --codec auto: what bits the data bears")
    asked.add_argument("--objective", choices=("throughput", "cost"), help="what to search for (default: throughput)")
    asked.add_argument("--pin", type=_pin, action="append", default=[], metavar="W=STAGE", help="put a worker there")
    asked.add_argument("--exclude", action="append", default=[], metavar="W", help="leave a worker out")
    asked.add_argument(
        "--time-limit", type=_seconds, metavar="S", help="seconds to search (default: as many as it takes)"
    )
    asked.add_argument("--seed", type=int, metavar="N", help="of the search (default: 0)")
    asked.add_argument("--replan", metavar="PLAN", help="change this plan as little as the topology asks for")
    more = parser.add_argument_group("more about the plan")
    more.add_argument("--break-even", action="store_true", help="say below which link speed its codecs pay")
    more.add_argument("--explain", action="store_true", help="set the naive plan beside it")
    more.add_argument("--compare", action="append", default=[], metavar="PLAN", help="set another plan beside it")
    more.add_argument("--tokens", type=_tokens, metavar="N", help="say what training on so many takes")


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="write the profile, or with --links the topology, to this file")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--dilation", type=_dilation, default=1.0, metavar="D", help="of the emulated network or job")
    layers = parser.add_argument_group("what layers cost on this machine")
    layers.add_argument("--model", metavar="M", help="a model's shape, by path or name")
    layers.add_argument("--microbatch-size", type=_count, default=1, metavar="B", help="samples a microbatch")
    layers.add_argument("--device", default="cpu", metavar="D", help="what computes (default: cpu)")
    layers.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrix products")
    layers.add_argument("--threads", type=_count, default=1, metavar="N", help="threads to compute with (default: 1)")
    layers.add_argument("--like", metavar="DEVICE", help="don't measure: derive it from a device's published speed")
    links = parser.add_argument_group("what links carry; started on every worker, with torchrun's environment")
    links.add_argument("--links", action="store_true", help="measure latency and rate of every pair, and shared lines")
    links.add_argument("--worker", metavar="NAME", help="who this process is (default: by environment or rank)")
    links.add_argument("--site", metavar="NAME", help="where it is (default: found by the latencies)")
    links.add_argument("--flops", metavar="SPEED", help="its computing speed, for the topology ('15 TFLOP/s')")
    links.add_argument("--profile", metavar="F", help="or a profile that was measured here")
    links.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds to wait for a peer")


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a plan file")
    parser.add_argument("--topology", metavar="T", help="a topology, by path or name (default: the plan's)")
    parser.add_argument("--model", metavar="M", help="a model's shape, by path or name (default: the plan's)")
    parser.add_argument("--profile", metavar="F", help="what its layers cost, as 'wantrain profile' measured it")
    changed = parser.add_argument_group("what if")
    changed.add_argument(
        "--set", action="append", default=[], metavar="'A->B=RATE'", help="another rate or latency between two ends"
    )
    changed.add_argument("--slow", action="append", default=[], metavar="W=FACTOR", help="a worker that takes longer")
    changed.add_argument("--gone", action="append", default=[], metavar="W=S", help="a worker that is gone at a time")
    changed.add_argument("--jitter", type=int, metavar="SEED", help="play the links' jitter")
    changed.add_argument("--blocking", action="store_true", help="sends hold up computing")
    parser.add_argument("--picture", metavar="FILE", help="draw the timeline (.svg or .png)")
    parser.add_argument("--trace", metavar="FILE", help="write it as a trace for Perfetto or Chrome")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run directory, or one of its step-… folders")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="text to go on from")
    parser.add_argument("--tokens", type=_count, default=300, metavar="N", help="tokens to add (default: 300)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=_count, default=40, metavar="K", help="draw among the K likeliest (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--export",
        metavar="PATH",
        help="write the whole model instead: one safetensors file, or for a Hugging Face model its folder",
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--trace", metavar="FILE", help="write what was measured as a trace for Perfetto instead")
    parser.add_argument("--step", type=int, metavar="N", help="with --trace: only this recorded step")


def _top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, of a run that goes on or has ended")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every", type=_seconds, default=1.0, metavar="S", help="seconds between frames (default: 1)")
    parser.add_argument("--json", action="store_true", help="print frames as JSON, one a line")
    parser.add_argument("--picture", metavar="FILE", help="write one frame as a picture (.svg) instead")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="which benchmark (default: list them)")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its own options; --help says which")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--peer", metavar="HOST", help="look at another machine and the line to it, by ssh")
    parser.add_argument("--hosts", metavar="FILE", help="with --peer: a hosts file; HOST is a worker in it")


def _pin(text: str) -> tuple[str, int]:
    """Parse WORKER=STAGE."""
    worker, _, stage = text.rpartition("=")
    if not worker or not stage.isdecimal():
        raise argparse.ArgumentTypeError(f"expected WORKER=STAGE (got {text!r})")
    return worker, int(stage)


def _seconds(text: str) -> float:
    """Parse a number of seconds above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above zero (got {text!r})")
    return value


def _whole(text: str) -> int:
    """Parse a number, at least zero."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number (got {text!r})")
    return int(text)


def _tokens(text: str) -> int:
    """Parse a number of tokens: 300000000000, 3e11."""
    value = _seconds(text)
    return round(value)


def _count(text: str) -> int:
    """Parse a number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above zero (got {text!r})")
    return int(text)


SUBCOMMANDS = (
    Subcommand(
        "doctor",
        "say what this machine can do, and what to do about the rest",
        _doctor_arguments,
        "wantrain.doctor:run",
    ),
    Subcommand("init", "write a commented run file", _init_arguments, "wantrain.configuring:init"),
    Subcommand(
        "config", "print a run file with every default spelled out", _config_arguments, "wantrain.configuring:show"
    ),
    Subcommand(
        "profile",
        "measure what a model's layers cost here, or what the links between workers carry",
        _profile_arguments,
        "wantrain.profiling:run",
    ),
    Subcommand(
        "plan", "find the best plan for a model on a topology, and explain it", _plan_arguments, "wantrain.planning:run"
    ),
    Subcommand(
        "simulate",
        "play a plan in virtual time, also under other conditions",
        _simulate_arguments,
        "wantrain.simulating:run",
    ),
    Subcommand(
        "emulate",
        "run a command on every worker of an emulated WAN",
        _emulate_arguments,
        "wantrain.netem.program:run",
        takes_command=True,
    ),
    Subcommand(
        "train", "run one worker of a job; what torchrun starts", _train_arguments, "wantrain.training.loop:run"
    ),
    Subcommand(
        "launch",
        "run all workers of a job here, inside the emulated WAN, over SSH, or on a Ray cluster",
        _launch_arguments,
        "wantrain.launch.choose:run",
    ),
    Subcommand(
        "wireguard",
        "write keys and configurations of an encrypted network among the machines of a hosts file",
        _wireguard_arguments,
        "wantrain.launch.wireguard:run",
    ),
    Subcommand("generate", "print text from what was trained", _generate_arguments, "wantrain.training.sample:run"),
    Subcommand(
        "top",
        "show a run in the terminal: loss, workers, links, who waits for whom",
        _top_arguments,
        "wantrain.watching.top:run",
    ),
    Subcommand("report", "write a run's HTML page", _report_arguments, "wantrain.report.page:run"),
    Subcommand(
        "bench",
        "what a network costs, and the other questions of the benchmark suite",
        _bench_arguments,
        "wantrain.benching:run",
    ),
    Subcommand("completion", "print a shell's completion script", _completion_arguments, "wantrain.completion:run"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = _Parser(prog="wantrain", description="Train transformers on machines joined by slow and uneven links.")
    parser.add_argument("--version", action="store_true", help="print the version and end")
    chosen = parser.add_subparsers(dest="subcommand", metavar="COMMAND", parser_class=_Parser)
    for one in SUBCOMMANDS:
        usage = "%(prog)s [options] TOPOLOGY [-- CMD …]" if one.takes_command else None
        inner = chosen.add_parser(one.name, help=one.summary, description=one.summary, usage=usage, allow_abbrev=False)
        one.add_arguments(inner)
    return parser


def parse(argv: Sequence[str]) -> tuple[Subcommand | None, argparse.Namespace]:
    """Split off the command after '--', and parse the rest; `args.argv` keeps the whole line."""
    own, command = _split(argv)
    parser = build_parser()
    name = next((word for word in own if not word.startswith("-")), None)
    known = {one.name: one for one in SUBCOMMANDS}
    if name is not None and name not in known:
        parser.error(f"unknown command '{name}'{did_you_mean(name, known)}")
    args = parser.parse_args(own)
    args.argv, args.command = list(argv), command
    subcommand = known.get(args.subcommand)
    if command and (subcommand is None or not subcommand.takes_command):
        parser.error(f"no command is taken here (got '{command[0]}' after '--')")
    if subcommand is None and not args.version:
        parser.print_help()
    return subcommand, args


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:cut]), list(argv[cut + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        subcommand, args = parse(sys.argv[1:] if argv is None else argv)
        if args.version:
            print(f"wantrain {_version()}")
        return 0 if subcommand is None else subcommand.run(args)
    except WantrainError as caught:
        print(f"wantrain: {caught}", file=sys.stderr)
        return caught.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; so do we, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _version() -> str:
    from importlib.metadata import version

    return version("wantrain")
