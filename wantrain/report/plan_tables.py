"""A plan explained for the terminal: where the step goes, what each link and worker bears, what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from wantrain.plan import Plan, Prediction
from wantrain.report.tables import deviation, percent, plain_table
from wantrain.scheduler.advice import Advice
from wantrain.scheduler.money import StepPrice
from wantrain.scheduler.played import PlayedStep
from wantrain.topology import Topology
from wantrain.units import format_bandwidth, format_bytes, format_time

_MOST_LINKS = 8
_S_PER_DAY = 86_400.0


@dataclass(frozen=True)
class PlayedPlan:
    """A plan, and what the simulator says of it on one topology."""

    name: str
    plan: Plan
    prediction: Prediction
    step: PlayedStep
    price: StepPrice


def parts_line(prediction: Prediction) -> str:
    """Say where the step's seconds go."""
    return (
        f"step {format_time(prediction.step_s)}: computing {format_time(prediction.compute_s)}, waiting for the"
        f" pipeline to fill and drain {format_time(prediction.bubble_s)}, communication that nothing hides"
        f" {format_time(prediction.exposed_communication_s)}"
    )


def links_table(played: PlayedPlan, topology: Topology) -> Table:
    """Show the busiest links, and what each carries in a step."""
    table = plain_table("busiest links")
    table.add_column("link")
    for heading in ("rate", "bytes a step", "busy"):
        table.add_column(heading, justify="right")
    sent = played.step.bytes_by_link()
    busy = {pair: num_bytes / topology.payload_bytes_per_s(*pair) for pair, num_bytes in sent.items()}
    for pair in sorted(busy, key=lambda pair: -busy[pair])[:_MOST_LINKS]:
        table.add_row(
            f"{pair[0]} → {pair[1]}",
            format_bandwidth(topology.send_limit_bytes_per_s(*pair)),
            format_bytes(sent[pair]),
            percent(busy[pair] / played.prediction.step_s),
        )
    return table


def workers_table(played: PlayedPlan, topology: Topology) -> Table:
    """Show what each worker holds, computes and needs."""
    plan, table = played.plan, plain_table("workers")
    table.add_column("worker")
    for heading in ("stage", "computes", "memory", "of"):
        table.add_column(heading, justify="right")
    compute_s = played.step.compute_by_rank()
    for rank, name in enumerate(plan.workers):
        share = compute_s[rank] / played.prediction.step_s
        needed, there = played.prediction.memory_bytes[name], topology.worker(name).memory_bytes
        table.add_row(name, str(plan.stage_of(rank)), percent(share), format_bytes(needed), format_bytes(there))
    return table


def comparison_table(plans: Sequence[PlayedPlan], has_prices: bool) -> Table:
    """Set plans beside the first of them."""
    table = plain_table("compared")
    table.add_column("plan")
    headings = ["shape", "step", "against the first", "not hidden", "most memory", *(["price"] if has_prices else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in plans:
        plan, prediction = one.plan, one.prediction
        cells = [
            f"{plan.num_stages} × {len(plan.replicas)}",
            format_time(prediction.step_s),
            deviation(prediction.step_s, plans[0].prediction.step_s),
            format_time(prediction.exposed_communication_s),
            format_bytes(max(prediction.memory_bytes.values())),
        ]
        table.add_row(one.name, *cells, *([f"{one.price.total:.4g}"] if has_prices else []))
    return table


def codecs_table(plan: Plan) -> Table:
    """Show the codec of every boundary and of the gradients."""
    table = plain_table("codecs")
    for heading in ("boundary", "forward", "backward"):
        table.add_column(heading)
    for index, boundary in enumerate(plan.boundaries):
        table.add_row(f"stage {index} ↔ {index + 1}", boundary.forward_codec, boundary.backward_codec)
    if len(plan.replicas) > 1:
        table.add_row("weight gradients", plan.gradient_codec, "")
    return table


def totals_line(played: PlayedPlan, tokens: int, tokens_per_step: int, has_prices: bool) -> str:
    """Say what training on so many tokens takes: days, bytes between workers, money."""
    steps = -(-tokens // tokens_per_step)
    moved = steps * sum(played.step.bytes_by_link().values())
    days = steps * played.prediction.step_s / _S_PER_DAY
    price = f", {steps * played.price.total:,.2f} in the topology's currency" if has_prices else ""
    return f"{tokens:,} tokens: {steps:,} steps, {days:.3g} days, {format_bytes(moved)} between workers{price}"


def break_even_line(bytes_per_s: float) -> str:
    """Say on which links the plan's codecs pay."""
    if not bytes_per_s:
        return "these codecs pay on no link: what they save is less than what they take"
    if math.isinf(bytes_per_s):
        return "these codecs pay on every link: nobody waits for them"
    return f"these codecs pay on links below {format_bandwidth(bytes_per_s)}"


def print_played(played: PlayedPlan, topology: Topology, advice: Sequence[Advice], notes: Sequence[str]) -> None:
    """Print everything that is known about a plan but the plan itself."""
    console = Console(soft_wrap=True)
    console.print(parts_line(played.prediction))
    for table in (codecs_table(played.plan), links_table(played, topology), workers_table(played, topology)):
        console.print(table)
    for one in advice:
        console.print(f"would help: {one}", highlight=False)
    for note in notes:
        console.print(note, highlight=False)


def as_json(
    played: PlayedPlan, advice: Sequence[str], notes: Sequence[str], compared: Sequence[PlayedPlan]
) -> dict[str, object]:
    """Return the plain form of a plan with what was found about it."""
    return {
        "plan": played.plan.model_dump(mode="json"),
        "price_per_step": played.price.total,
        "bytes_by_link": {f"{a} -> {b}": n for (a, b), n in played.step.bytes_by_link().items()},
        "would_help": list(advice),
        "notes": list(notes),
        "compared": {one.name: one.plan.model_dump(mode="json") for one in compared},
    }
