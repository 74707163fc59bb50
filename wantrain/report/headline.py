"""The page's first lines: what came out, held against what there is to hold it against, and what ran where."""

from __future__ import annotations

from typing import Any

from wantrain.plan import Plan
from wantrain.report import html
from wantrain.report.html import Tile
from wantrain.report.read import RunData, link_uses
from wantrain.report.tables import deviation, distance, percent
from wantrain.units import format_time


def headline(data: RunData) -> str:
    """What came out: loss beside the trigram, speed, step time beside the prediction, the busiest link."""
    found = (_loss_tile(data), _speed_tile(data), _step_tile(data), _link_tile(data), _steps_tile(data))
    return html.tiles(tile for tile in found if tile)


def _loss_tile(data: RunData) -> Tile | None:
    last = data.validations[-1].validation_loss if data.validations else None
    loss, trigram = data.summary.get("validation_loss", last), data.summary.get("trigram_loss")
    if loss is None:
        return None
    if trigram is None:
        return Tile("held-out loss", f"{loss:.3f}", "nats per token")
    return Tile(
        "held-out loss", f"{loss:.3f}", f"nats per token; trigram model {trigram:.3f}, {distance(loss, trigram)}"
    )


def _speed_tile(data: RunData) -> Tile | None:
    if "tokens_per_s" in data.summary:
        return Tile("tokens per second", f"{data.summary['tokens_per_s']:,.0f}", "over the whole run")
    records = data.steps[0][-20:] if data.steps else ()
    seconds = sum(record.step_s for record in records)
    if not seconds:
        return None
    return Tile("tokens per second", f"{sum(r.tokens for r in records) / seconds:,.0f}", f"last {len(records)} steps")


def _step_tile(data: RunData) -> Tile | None:
    if data.median_step_s is None:
        return None
    predicted = data.plan.prediction.step_s if data.plan and data.plan.prediction else None
    if predicted is None and data.predicted:
        predicted = data.predicted.span_s
    note = "median"
    if predicted:
        note = f"median; predicted {format_time(predicted)}, {deviation(data.median_step_s, predicted)} against it"
    return Tile("step", format_time(data.median_step_s), note)


def _link_tile(data: RunData) -> Tile | None:
    uses = link_uses(data)
    if not uses:
        return None
    return Tile("busiest link", percent(uses[0].busy_share), f"{uses[0].source} → {uses[0].target}, share of the step")


def _steps_tile(data: RunData) -> Tile:
    note = _state(data)
    if "seconds" in data.summary:
        note += f", {format_time(data.summary['seconds'])}"
    return Tile("steps", f"{data.num_done:,}", note)


def _state(data: RunData) -> str:
    """Say how far the run has come: a run that was killed looks like one still going, so neither is claimed."""
    if data.summary.get("interrupted"):
        return "interrupted" if data.num_planned is None else f"of {data.num_planned:,}, interrupted"
    if data.num_planned is None:
        return "so far"
    return "all done" if data.num_done >= data.num_planned else f"of {data.num_planned:,} so far"


def about(data: RunData) -> str:
    """What ran, and where; emulation and dilation are always stated."""
    pairs = [("network", network_line(data))]
    if data.plan:
        pairs.insert(0, ("plan", plan_line(data.plan)))
        pairs.insert(0, ("model", f"{data.plan.model}, {data.plan.num_layers} layers{_parameters(data.summary)}"))
    known = ("workers", "machine", "torch", "commit")
    shown = {"steps", "seconds", "tokens_per_s", "validation_loss", "trigram_loss", "parameters", "interrupted"}
    pairs += [(key, plain(data.summary[key])) for key in known if key in data.summary]
    pairs += [(key.replace("_", " "), plain(v)) for key, v in data.summary.items() if key not in {*known, *shown}]
    return html.facts(pairs)


def _parameters(summary: dict[str, Any]) -> str:
    return f", {summary['parameters'] / 1e6:.2f} million parameters" if "parameters" in summary else ""


def plain(value: Any) -> str:
    """Write a value as text, a list with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plan_line(plan: Plan) -> str:
    """Say the shape of a plan in a line."""
    stages, replicas = len(plan.stages), len(plan.replicas)
    return (
        f"{stages} stage{'s' * (stages > 1)} × {replicas} replica{'s' * (replicas > 1)}, {plan.schedule}, "
        f"batch {plan.batch_size} in microbatches of {plan.microbatch_size}"
    )


def network_line(data: RunData) -> str:
    """Say whether the network was emulated, how, and how far time was dilated."""
    if data.network is None:
        return "not emulated: the machines' own network"
    dilation = data.network.dilation
    dilated = "no time dilation" if dilation == 1 else f"time dilated {dilation:g}×, all figures undilated"
    return f"emulated {data.topology.name if data.topology else ''} (delay by {data.network.delay_by}), {dilated}"
