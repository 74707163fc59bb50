"""Plan, network and closing figures for the terminal, and the rules that say when a figure is off."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wantrain.errors import ConfigError
from wantrain.fact import read_json
from wantrain.plan import Plan, StagePlan
from wantrain.resources import program
from wantrain.run_directory import LinkMeasurement, NetworkRecord, RunDirectory
from wantrain.topology import Topology
from wantrain.units import format_bytes, format_time

RATE_TOLERANCE = 0.05
"""Chosen: the emulation's own promise (docs: within 5 % of what was asked)."""

LATENCY_TOLERANCE_S = 1e-3
"""Chosen: the emulation's own promise (within 1 ms or 5 %, whichever is more)."""


def percent(share: float) -> str:
    """Print a share: 0.364 → "36 %"."""
    return f"{100 * share:.0f} %"


def deviation(measured: float, expected: float) -> str:
    """Say how far a figure lies from what was expected: "+3.2 %"."""
    return f"{measured / expected - 1:+.1%}".replace("%", " %") if expected else "–"


def is_rate_off(link: LinkMeasurement) -> bool:
    """Whether the measured rate misses what was asked by more than the tolerance."""
    return abs(link.measured_bytes_per_s - link.asked_bytes_per_s) > RATE_TOLERANCE * link.asked_bytes_per_s


def is_latency_off(link: LinkMeasurement) -> bool:
    """Whether the measured latency misses what was asked by more than the tolerance."""
    allowed_s = max(LATENCY_TOLERANCE_S, RATE_TOLERANCE * link.asked_latency_s)
    return abs(link.measured_latency_s - link.asked_latency_s) > allowed_s


def layer_range(stage: StagePlan) -> str:
    """Name a stage's layers: "0–5", or "7" for a single one."""
    last = stage.end_layer - 1
    return str(last) if stage.first_layer == last else f"{stage.first_layer}–{last}"


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def with_sites(workers: Iterable[str], topology: Topology | None) -> list[str]:
    """Name workers with their sites, as far as the topology knows them: "oregon-0 (oregon)"."""
    sites = {worker.name: worker.site for worker in topology.workers} if topology else {}
    return [f"{name} ({sites[name]})" if sites.get(name) else name for name in workers]


def plan_table(plan: Plan, topology: Topology | None = None) -> Table:
    """Show who holds which layers, one row per replica and one column per stage."""
    table = plain_table(f"plan: {plan.model} on {plan.topology}, {plan.schedule}")
    table.add_column("")
    for i, stage in enumerate(plan.stages):
        table.add_column(f"stage {i}\nlayers {layer_range(stage)}\n{stage.max_in_flight} in flight")
    table.add_column("microbatches", justify="right")
    for i, replica in enumerate(plan.replicas):
        table.add_row(
            f"replica {i}",
            *with_sites(replica.workers, topology),
            f"{replica.num_microbatches} × {plan.microbatch_size}",
        )
    if plan.prediction:
        table.caption = _prediction_line(plan)
        table.caption_justify = "left"
    return table


def _prediction_line(plan: Plan) -> str:
    assert plan.prediction is not None
    most = max(plan.prediction.memory_bytes.values(), default=0)
    memory = f", at most {format_bytes(most)} per worker" if most else ""
    return f"predicted: {format_time(plan.prediction.step_s)} a step{memory}; bottleneck: {plan.prediction.bottleneck}"


def network_table(record: NetworkRecord) -> Table:
    """Show every link's payload rate and one-way latency, asked beside measured; what is off is marked with "!"."""
    dilation = "no time dilation" if record.dilation == 1 else f"time dilated {record.dilation:g}×"
    table = plain_table(f"network: payload rate and one-way latency; delay by {record.delay_by}, {dilation}")
    table.add_column("link")
    for heading in ("Mbit/s\nasked", "\nmeasured", "\noff", "ms\nasked", "\nmeasured"):
        table.add_column(heading, justify="right", no_wrap=True)
    for link in record.links:
        table.add_row(*_network_row(link))
    return table


def _network_row(link: LinkMeasurement) -> list[str]:
    """Units stand in the heading here, so that twelve links fit a terminal of 80 columns."""
    rate = deviation(link.measured_bytes_per_s, link.asked_bytes_per_s)
    return [
        f"{link.source} → {link.target}",
        f"{link.asked_bytes_per_s * 8 / 1e6:.4g}",
        f"{link.measured_bytes_per_s * 8 / 1e6:.4g}",
        _marked(rate, is_rate_off(link)),
        f"{link.asked_latency_s * 1e3:.4g}",
        _marked(f"{link.measured_latency_s * 1e3:.4g}", is_latency_off(link)),
    ]


def _marked(text: str, is_off: bool) -> str:
    return f"[bold red]{text} ![/]" if is_off else f"{text}  "


def print_plan(plan: Plan, topology: Topology | None = None, console: Console | None = None) -> None:
    """Print who holds which layers."""
    (console or Console()).print(plan_table(plan, topology))


def print_network(record: NetworkRecord, console: Console | None = None) -> None:
    """Print the network, asked beside measured."""
    (console or Console()).print(network_table(record))


def print_summary(
    run: RunDirectory, interrupted: bool = False, console: Console | None = None, hosts: str | None = None
) -> None:
    """Print what a run came to, where its report is, and the command that goes on from here; `hosts` is the file that
    says where it ran, if not here."""
    figures = read_json(run.summary, ConfigError) if run.summary.exists() else {}
    out = console or Console()
    for name, value in summary_lines(run, figures, interrupted, hosts):
        out.print(Text.assemble((f"{name:<15}", "bold"), value), soft_wrap=True)


def summary_lines(
    run: RunDirectory, figures: dict[str, Any], interrupted: bool, hosts: str | None = None
) -> list[tuple[str, str]]:
    """Return the closing lines, name and value; figures that a run has not got are left out."""
    lines = [("held-out loss", loss_line(figures))] if "validation_loss" in figures else []
    if "tokens_per_s" in figures:
        lines.append(("speed", f"{figures['tokens_per_s']:,.0f} tokens/s"))
    if "steps" in figures and "seconds" in figures:
        lines.append(("steps", f"{figures['steps']:,} in {format_time(figures['seconds'])}"))
    lines.append(("report", str(run.report)))
    path, wantrain = shlex.quote(str(run.path)), shlex.quote(program())
    if interrupted:
        config = shlex.quote(str(run.config))
        where = "" if hosts is None else f" --hosts {shlex.quote(hosts)}"
        lines.append(("go on with", f"{wantrain} launch {config}{where} --run-dir {path} --resume"))
    if hosts is not None:
        return [*lines, ("checkpoints", "on the hosts, each with its own layers")]
    lines.append(("sample with", f"{wantrain} generate {path} --prompt 'def '"))
    return lines


def loss_line(figures: dict[str, Any]) -> str:
    """Say the held-out loss, beside the trigram model's where that is known."""
    loss, trigram = figures["validation_loss"], figures.get("trigram_loss")
    if trigram is None:
        return f"{loss:.3f} nats per token"
    return f"{loss:.3f} nats per token; trigram model {trigram:.3f}, {distance(loss, trigram)}"


def distance(loss: float, trigram: float) -> str:
    """Say on which side of the trigram model a loss lies, and how far."""
    return f"{abs(loss - trigram):.3f} {'below' if loss < trigram else 'above'} it"
