"""`wantrain plan`: make a plan for a run file, print it, write it, print how to start it."""

from __future__ import annotations

import argparse
import shlex
import sys

from wantrain.launch.torchrun import MASTER_PORT, train_argv, worker_argv
from wantrain.report.tables import print_plan
from wantrain.training.job import Job, load_config, resolve


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain plan`."""
    job = resolve(load_config(args.config, topology=args.topology))
    if args.out is not None:
        job.plan.save(args.out)
    if args.json:
        print(job.plan.model_dump_json(indent=1))
    elif args.commands:
        _print_commands(job, args)
    else:
        print_plan(job.plan, job.topology)
    return 0


def _print_commands(job: Job, args: argparse.Namespace) -> None:
    """Print the line to start on each host; all of them need the plan file, the run file and the text."""
    plan_file = args.out or "plan.json"
    if args.out is None:
        print(f"write the plan first: wantrain plan {shlex.quote(args.config)} --out {plan_file}", file=sys.stderr)
    first = job.topology.worker(job.plan.workers[0])
    options = ["--plan", plan_file] + (["--topology", args.topology] if args.topology else [])
    train = train_argv(args.config, *options)
    for name in job.plan.workers:
        argv = worker_argv(job.plan, name, first.address or f"<address of {first.name}>", MASTER_PORT, train)
        print(f"# on {name}" + (f" ({address})" if (address := job.topology.worker(name).address) else ""))
        print(" ".join(word if word.startswith("<") else shlex.quote(word) for word in argv))
