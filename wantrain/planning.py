"""`wantrain plan`: the best plan found for a model on a topology, why, what it costs, and how to start it.

What is planned comes from a run file, or is said with --topology and --model (or --profile), and the rest is searched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from wantrain.codec_spec import check_activation_codec, check_gradient_codec
from wantrain.errors import ConfigError, PlanError
from wantrain.hf_model import Model, load_model
from wantrain.hf_profile import counted_profile
from wantrain.launch.torchrun import MASTER_PORT, train_argv, worker_argv
from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.report.plan_tables import (
    PlayedPlan,
    as_json,
    break_even_line,
    comparison_table,
    print_played,
    totals_line,
)
from wantrain.report.tables import print_plan
from wantrain.scheduler.advice import what_would_help
from wantrain.scheduler.bits import Seen, fewest_bits, give_back_bits
from wantrain.scheduler.break_even import break_even_bytes_per_s
from wantrain.scheduler.cost_model import predict_and_play
from wantrain.scheduler.money import dear_workers, has_prices, step_price
from wantrain.scheduler.replan import replan
from wantrain.scheduler.solve import Search, find_plan, naive_plan
from wantrain.topology import Topology
from wantrain.training.job import load_config, load_topology, profile_of, resolve

_SEARCHED = (
    "model", "profile", "batch_size", "microbatch_size", "stages", "replicas", "schedule", "codec", "gradient_codec",
    "data_seen", "objective", "pin", "exclude", "replan", "time_limit", "seed",
)  # fmt: skip
"""Options that say what a run file says, or that change its plan."""

_MICROBATCH_SIZES = (1, 2, 4, 8)
_MOST_ADVICE = 3


@dataclass(frozen=True)
class Request:
    """What is to be planned. `plan` makes the best plan; `profile` counts the model for a microbatch size."""

    topology: Topology
    profile: Callable[[int], ModelProfile]
    plan: Callable[[], Plan]
    seq_len: int | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the search has to say, filled by `plan`."""

    def play(self, name: str, plan: Plan) -> PlayedPlan:
        """Return a plan with what the simulator says of it here."""
        prediction, played = predict_and_play(plan, self.topology, self.profile(plan.microbatch_size))
        price = step_price(plan, self.topology, prediction.step_s, played.bytes_by_link())
        return PlayedPlan(name, plan, prediction, played, price)


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain plan`."""
    request = _from_run_file(args) if args.config else _from_options(args)
    plan = request.plan()
    if args.out is not None:
        plan.save(args.out)
    if args.commands:
        _print_commands(plan, request.topology, args)
    else:
        _print(request, plan, args)
    return 0


def _from_run_file(args: argparse.Namespace) -> Request:
    said = next((name for name in _SEARCHED if getattr(args, name) not in (None, [])), None)
    if said is not None:
        option = f"--{said.replace('_', '-')}"
        raise ConfigError(f"{option} is for planning without a run file; change '{args.config}', or leave it out")
    job = resolve(load_config(args.config, topology=args.topology, overrides=args.set))
    return Request(job.topology, lambda _: profile_of(job.config), lambda: job.plan, job.config.model.seq_len)


def _from_options(args: argparse.Namespace) -> Request:
    if args.topology is None or (args.model is None) == (args.profile is None) or args.batch_size is None:
        raise ConfigError(
            "nothing to plan; give a run file, or --topology with --batch-size and one of --model and --profile"
        )
    if args.commands:
        raise ConfigError("--commands needs a run file, which says what is trained; give one")
    if args.set:
        raise ConfigError("--set changes what a run file says; give one")
    _refuse_ignored(args)
    topology = load_topology(args.topology)
    profile, model = _profiled(args)
    limits: dict[str, Any] = {
        "model": args.model or args.profile,
        "batch_size": args.batch_size,
        "num_stages": args.stages,
        "num_replicas": args.replicas,
        "schedule": args.schedule or ("1f1b" if args.replan is None else Plan.load(args.replan).schedule),
        "pinned": dict(args.pin),
        "excluded": tuple(args.exclude),
        "time_limit_s": args.time_limit,
        "seed": args.seed or 0,
    }
    seq_len = None if model is None else model.seq_len
    request = Request(topology, profile, lambda: _search(args, request), seq_len, limits)
    return request


def _refuse_ignored(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that another one would make void."""
    if args.data_seen is not None and args.codec != "auto":
        raise ConfigError("--data-seen says what --codec auto may choose; give that too, or leave it out")
    for option, is_given in (("--codec auto", args.codec == "auto"), ("--objective cost", args.objective == "cost")):
        if args.replan is not None and is_given:
            raise ConfigError(f"--replan keeps codecs and looks for short steps; it can't be had with {option}")


def _profiled(args: argparse.Namespace) -> tuple[Callable[[int], ModelProfile], Model | None]:
    """Return what layers cost by microbatch size, counted or measured at one size, and whose layers they are."""
    if args.profile is not None:
        measured = ModelProfile.load(args.profile)
        return lambda _: measured, measured.model
    model = load_model(args.model)
    return lambda size: counted_profile(model, size), model


def _search(args: argparse.Namespace, request: Request) -> Plan:
    """Return the best plan over the microbatch sizes that come into question."""
    found: list[tuple[Plan, Sequence[str]]] = []
    problems: list[PlanError] = []
    for size in _sizes(args, request):
        try:
            found.append(_search_size(args, request, size))
        except PlanError as caught:
            problems.append(caught)
    if not found:
        raise problems[0]
    objective = _objective(args, request)
    plan, notes = min(found, key=lambda one: objective(one[0]))
    request.notes.extend(notes)
    return plan


def _sizes(args: argparse.Namespace, request: Request) -> Iterable[int]:
    if args.profile is not None:
        return [request.profile(0).microbatch_size]
    if args.microbatch_size is not None:
        return [args.microbatch_size]
    return [size for size in _MICROBATCH_SIZES if args.batch_size % size == 0]


def _search_size(args: argparse.Namespace, request: Request, size: int) -> tuple[Plan, Sequence[str]]:
    """Return the best plan at one microbatch size, and what the search has to say."""
    profile, seen = request.profile(size), _seen(args)
    choices = request.limits | _codecs(args, seen)
    if args.replan is not None:
        found = replan(Plan.load(args.replan), request.topology, profile, **choices)
        return found.plan, [found.summary]
    search = _search_cheap(args, request, choices, profile) if args.objective == "cost" else None
    search = search or find_plan(request.topology, profile, **choices)
    if args.codec == "auto":
        return give_back_bits(search.plan, request.topology, profile, seen), search.notes
    return search.plan, search.notes


def _search_cheap(
    args: argparse.Namespace, request: Request, choices: dict[str, Any], profile: ModelProfile
) -> Search | None:
    """Return the search whose plan costs least: the solver looks for short steps, so it is kept from dear workers."""
    objective, found = _objective(args, request), []
    for dear in dear_workers(request.topology):
        asked = choices | {"excluded": (*choices["excluded"], *dear), "objective": objective}
        with contextlib.suppress(PlanError):  # the others don't suffice
            found.append(find_plan(request.topology, profile, **asked))
    return min(found, key=lambda one: objective(one.plan), default=None)


def _seen(args: argparse.Namespace) -> Seen:
    seen: Seen = args.data_seen or "once"
    return seen


def _codecs(args: argparse.Namespace, seen: Seen) -> dict[str, str]:
    """Return make_plan's codecs: the fewest bits that the data bears, or those that were asked for."""
    if args.codec == "auto":
        return fewest_bits(seen) | ({"gradient_codec": args.gradient_codec} if args.gradient_codec else {})
    forward, _, backward = (args.codec or "raw:fp32").partition("/")
    return {
        "forward_codec": check_activation_codec(forward, is_forward=True),
        "backward_codec": check_activation_codec(backward or forward, is_forward=False),
        "gradient_codec": check_gradient_codec(args.gradient_codec or "raw:fp32"),
    }


def _objective(args: argparse.Namespace, request: Request) -> Callable[[Plan], float]:
    if args.objective != "cost":
        return lambda plan: _step_s(plan)
    if not has_prices(request.topology):
        raise ConfigError(
            f"topology '{request.topology.name}' names no prices; add price_per_hour to its workers and price_per_gb"
            " to its links"
        )
    return lambda plan: request.play("", plan).price.total


def _step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def _print(request: Request, plan: Plan, args: argparse.Namespace) -> None:
    played = request.play("this plan", plan)
    beside = [played, *_beside(request, plan, args)]
    advice = what_would_help(plan, request.topology, request.profile(plan.microbatch_size))[:_MOST_ADVICE]
    notes = _notes(request, played, args)
    if args.json:
        print(json.dumps(as_json(played, [str(one) for one in advice], notes, beside[1:]), indent=1))
        return
    print_plan(plan, request.topology)
    print_played(played, request.topology, advice, notes)
    if len(beside) > 1:
        Console().print(comparison_table(beside, has_prices(request.topology)))


def _beside(request: Request, plan: Plan, args: argparse.Namespace) -> Iterator[PlayedPlan]:
    """Yield what the plan is compared with: the naive one if asked to explain, and plans from files."""
    if args.explain:
        naive = naive_plan(
            request.topology,
            request.profile(plan.microbatch_size),
            batch_size=plan.batch_size,
            num_stages=plan.num_stages,
            num_replicas=len(plan.replicas),
            forward_codec=plan.boundaries[0].forward_codec if plan.boundaries else "raw:fp32",
            backward_codec=plan.boundaries[0].backward_codec if plan.boundaries else "raw:fp32",
            gradient_codec=plan.gradient_codec,
        )
        yield request.play("naive: file order, even split", naive)
    for path in args.compare:
        yield request.play(path, Plan.load(path))


def _notes(request: Request, played: PlayedPlan, args: argparse.Namespace) -> list[str]:
    notes = []
    if args.tokens is not None:
        if request.seq_len is None:
            raise ConfigError("--tokens needs to know a sample's length, which a profile doesn't say; give --model")
        per_step = played.plan.batch_size * request.seq_len
        notes.append(totals_line(played, args.tokens, per_step, has_prices(request.topology)))
    if args.break_even:
        profile = request.profile(played.plan.microbatch_size)
        notes.append(break_even_line(break_even_bytes_per_s(played.plan, request.topology, profile)))
    return [*request.notes, *notes]


def _print_commands(plan: Plan, topology: Topology, args: argparse.Namespace) -> None:
    """Print the line to start on each host; all of them need the plan file, the run file and the text."""
    plan_file = args.out or "plan.json"
    if args.out is None:
        changed = "".join(f" --set {shlex.quote(one)}" for one in args.set)
        print(
            f"write the plan first: wantrain plan {shlex.quote(args.config)}{changed} --out {plan_file}",
            file=sys.stderr,
        )
    first = topology.worker(plan.workers[0])
    options = ["--plan", plan_file] + (["--topology", args.topology] if args.topology else [])
    options += [word for one in args.set for word in ("--set", one)]
    train = train_argv(args.config, *options)
    for name in plan.workers:
        argv = worker_argv(plan, name, first.address or f"<address of {first.name}>", MASTER_PORT, train)
        print(f"# on {name}" + (f" ({address})" if (address := topology.worker(name).address) else ""))
        print(" ".join(word if word.startswith("<") else shlex.quote(word) for word in argv))
