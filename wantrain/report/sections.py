"""The report's sections, each from what is known of the run; one without data says so in a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from statistics import mean

from wantrain.plan import Plan
from wantrain.report import html
from wantrain.report.figures import error_by_step, loss_by_step, loss_by_time, throughput
from wantrain.report.headline import network_line, plain, plan_line
from wantrain.report.html import Cell
from wantrain.report.read import CodecLine, LinkUse, RankTime, RunData, codec_losses, link_uses, rank_times
from wantrain.report.style import house_style, to_svg
from wantrain.report.tables import (
    deviation,
    is_latency_off,
    is_rate_off,
    layer_range,
    percent,
    with_sites,
)
from wantrain.report.timelines import MAX_RANKS, draw_timelines
from wantrain.run_directory import LinkMeasurement
from wantrain.units import format_bandwidth, format_bytes, format_time


def learning(data: RunData) -> str:
    """Loss against steps and wall clock, throughput against steps."""
    if not data.steps or not data.steps[0]:
        return html.absent("Learning", "No step has been finished yet.")
    with house_style():
        drawn = [
            (to_svg(loss_by_step(data), "loss against steps"), "Loss against steps"),
            (to_svg(loss_by_time(data), "loss against wall clock"), f"Loss against the wall clock{_slowed(data)}"),
            (to_svg(throughput(data.steps[0]), "tokens per second"), "Throughput"),
        ]
    figures = "".join(html.figure(svg, caption, "small") for svg, caption in drawn)
    intro = "Thin: each step. Bold: mean over a twentieth of the run."
    return html.section("Learning", f"<div class='grid'>{figures}</div>", intro)


def _slowed(data: RunData) -> str:
    dilation = data.network.dilation if data.network else 1.0
    return "" if dilation == 1 else f", slowed {dilation:g}× as it ran"


def one_step(data: RunData) -> str:
    """The timeline of one step per rank, prediction above measurement."""
    timelines = [timeline for timeline in (data.predicted, data.measured) if timeline and timeline.events]
    if len(timelines) == 2 and timelines[0].workers != timelines[1].workers:
        timelines = timelines[1:]
    if not timelines:
        return html.absent("One step", "No timeline has been recorded yet.")
    with house_style():
        svg = to_svg(draw_timelines(timelines), "what each rank did during one step")
    missing = "" if data.measured else " No step has been recorded yet: this is the prediction alone."
    missing += "" if data.predicted else " There is no prediction for this run."
    if len(data.workers) > MAX_RANKS:
        missing += f" Shown: the first {MAX_RANKS} of {len(data.workers)} ranks."
    caption = (
        "Numbers are microbatches; a name in a wait is who was waited for. Below each rank: what it has on the wire."
    )
    return html.section(
        "One step", html.figure(svg, caption, "wide"), f"The step of median length among those recorded.{missing}"
    )


def links(data: RunData) -> str:
    """Bytes and busy share of every link that was used."""
    uses = link_uses(data)
    if not uses:
        return html.absent("Links", "Nothing was sent from worker to worker so far.")
    most = max(use.wire_bytes for use in uses)
    head = ("from", "to", "busy", "on the wire per step", "before coding", "rate while sending", "link's rate")
    rows = [_link_row(data, use, most) for use in uses]
    return html.section(
        "Links",
        html.table(head, rows, 2),
        "Means over all steps. Busy: the share of the step's time in which something was under way.",
    )


def _link_row(data: RunData, use: LinkUse, most: float) -> list[Cell]:
    names = {worker.name for worker in data.topology.workers} if data.topology else set()
    known = data.topology is not None and use.source in names and use.target in names
    limit = data.topology.send_limit_bytes_per_s(use.source, use.target) if known and data.topology else None
    return [
        Cell(use.source),
        Cell(use.target),
        Cell(percent(use.busy_share), share=use.busy_share),
        Cell(format_bytes(use.wire_bytes), share=use.wire_bytes / most if most else 0.0),
        Cell(format_bytes(use.raw_bytes)),
        Cell(format_bandwidth(use.sending_bytes_per_s)),
        Cell(format_bandwidth(limit) if limit else "–"),
    ]


def codecs(data: RunData) -> str:
    """What the lossy codecs lost on each boundary; nothing where all of them are raw."""
    losses = codec_losses(data)
    if not losses:
        return ""
    with house_style():
        svg = to_svg(error_by_step(losses), "relative error against steps")
    head = ("from", "to", "bits", "relative error, at first", "last tenth", "clipped, last tenth")
    rows = [_codec_row(line) for line in losses]
    intro = "One microbatch a step is measured: the norm of what quantizing lost, by the norm of what was sent."
    body = html.figure(svg, "Relative error against steps", "small") + html.table(head, rows, 2)
    return html.section("Codecs", body, intro)


def _codec_row(line: CodecLine) -> list[Cell]:
    last = line.losses[-max(1, len(line.losses) // 10) :]
    return [
        Cell(line.source),
        Cell(line.target),
        Cell(str(line.losses[-1].bits)),
        Cell(f"{line.losses[0].relative_error:.3g}"),
        Cell(f"{mean(one.relative_error for one in last):.3g}"),
        Cell(f"{mean(one.clipped_share for one in last):.2%}".replace("%", " %")),
    ]


def waiting(data: RunData) -> str:
    """Who waits for whom: each rank's average step, split."""
    times = rank_times(data)
    if not times:
        return html.absent("Who waits for whom", "No step has been finished yet.")
    peers = [name for name in data.workers if any(name in time.waited_s for time in times)]
    peers += sorted({name for time in times for name in time.waited_s} - set(peers))
    head = ("worker", "computes", *(f"waits for {peer}" if peer else "waits" for peer in peers), "other", "step")
    rows = [_waiting_row(time, peers) for time in times]
    intro = "Seconds of an average step. Other: gradients under way, the optimizer, agreeing on the norm."
    return html.section("Who waits for whom", html.table(head, rows, shown=64), intro)


def _waiting_row(time: RankTime, peers: Sequence[str]) -> list[Cell]:
    def part(seconds: float) -> float:
        return seconds / time.step_s if time.step_s else 0.0

    waits = [time.waited_s.get(peer, 0.0) for peer in peers]
    return [
        Cell(time.worker),
        Cell(f"{format_time(time.compute_s)} · {percent(part(time.compute_s))}", share=part(time.compute_s)),
        *(Cell(f"{format_time(s)} · {percent(part(s))}" if s else "", shade=part(s)) for s in waits),
        Cell(f"{format_time(time.other_s)} · {percent(part(time.other_s))}", shade=0.4 * part(time.other_s)),
        Cell(format_time(time.step_s)),
    ]


def network(data: RunData) -> str:
    """The network asked and measured."""
    if data.network is None:
        return html.absent(
            "Network, asked and measured", "This run was not emulated, so there is nothing asked to measure against."
        )
    head = ("from", "to", "rate asked", "measured", "off", "latency asked", "measured", "off")
    rows = [_network_row(link) for link in data.network.links]
    line = network_line(data)
    intro = f"Payload rates and one-way latencies, measured before the run. {line[0].upper()}{line[1:]}."
    return html.section("Network, asked and measured", html.table(head, rows, 2), intro)


def _network_row(link: LinkMeasurement) -> list[Cell]:
    return [
        Cell(link.source),
        Cell(link.target),
        Cell(format_bandwidth(link.asked_bytes_per_s)),
        Cell(format_bandwidth(link.measured_bytes_per_s)),
        Cell(deviation(link.measured_bytes_per_s, link.asked_bytes_per_s), is_off=is_rate_off(link)),
        Cell(format_time(link.asked_latency_s)),
        Cell(format_time(link.measured_latency_s)),
        Cell(format_time(abs(link.measured_latency_s - link.asked_latency_s)), is_off=is_latency_off(link)),
    ]


def plan_grid(data: RunData) -> str:
    """Who holds which layers."""
    plan = data.plan
    if plan is None:
        return html.absent("Plan", "The run directory holds no plan.")
    head = ["", *(f"stage {i}: layers {layer_range(s)}" for i, s in enumerate(plan.stages)), "microbatches", "lanes"]
    rows: list[list[Cell | str]] = [
        [
            f"replica {i}",
            *with_sites(replica.workers, data.topology),
            str(replica.num_microbatches),
            plain(list(replica.lanes)),
        ]
        for i, replica in enumerate(plan.replicas)
    ]
    rows.append(["in flight", *(str(stage.max_in_flight) for stage in plan.stages), "", ""])
    if plan.boundaries:
        codecs = [f"→ {b.forward_codec}, ← {b.backward_codec}" for b in plan.boundaries]
        rows.append(["codecs to the next", *codecs, "", "", ""])
    body = html.table(head, rows, len(plan.stages) + 1)
    gradients = f" Gradients: {plan.gradient_codec}." if len(plan.replicas) > 1 else ""
    return html.section("Plan", body + memory(data), f"{plan_line(plan)}.{gradients}{_reason(plan)}")


def _reason(plan: Plan) -> str:
    return f" Bottleneck: {plan.prediction.bottleneck}." if plan.prediction and plan.prediction.bottleneck else ""


def memory(data: RunData) -> str:
    """Predicted memory per worker, against what the worker has."""
    if not data.plan or not data.plan.prediction or not data.plan.prediction.memory_bytes:
        return "<p class='intro'>The plan carries no prediction of memory.</p>"
    has = {worker.name: worker.memory_bytes for worker in data.topology.workers} if data.topology else {}
    predicted = data.plan.prediction.memory_bytes
    most = max(predicted.values()) or 1
    rows = [
        [Cell(name), Cell(format_bytes(size), share=size / has.get(name, most)), Cell(_size_or_dash(has.get(name)))]
        for name, size in predicted.items()
    ]
    return "<h3>Memory, predicted</h3>" + html.table(("worker", "needs", "has"), rows)


def _size_or_dash(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def config(data: RunData) -> str:
    """The resolved config, folded."""
    if data.config is None:
        return html.absent("Config", "The run directory holds no config.json.")
    text = escape(json.dumps(data.config, indent=2, ensure_ascii=False))
    return f"<section><details><summary>Config, as resolved</summary><pre>{text}</pre></details></section>"
