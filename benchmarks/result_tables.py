"""The tables of docs/results.md: what makes each of the measured records of one result file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench_hooks
import bench_time_to_loss
from bench_convergence import table as convergence_table
from bench_prediction import stored_runs
from bench_published import Cell, medians
from network_rows import HEAD, cells, rows_of
from network_rows import Row as NetworkRow
from pictures import kernel_speeds
from wantrain.units import format_bandwidth, format_bytes

Record = dict[str, Any]


def newest(records: list[Record], key: Callable[[Record], object]) -> list[Record]:
    """Return the last record of each setting, in the order in which settings first came up."""
    return list({key(record): record for record in records}.values())


def network_rows(records: list[Record], choose: Callable[[list[NetworkRow]], list[NetworkRow]] = list) -> Iterator[str]:
    """Yield the table of pipelines by network, wantrain's beside others'; of the rows that `choose` returns."""
    rows = choose(rows_of(records))
    yield (
        "Seconds a step of GPT-2 XL's shapes, compute and network emulated: the median of `n` steps at dilation `d`;"
        " how near the bound of a work-conserving schedule; how much longer than wantrain uncompressed at 10 Gbit/s;"
        " how many times as long the best other program takes; the busiest rank's processor seconds, undilated; the"
        " share of the machine's processors that went to others meanwhile:\n"
    )
    yield _row(["stages × microbatches", *HEAD])
    yield _row(["---"] * (1 + len(HEAD)))
    for row in sorted(rows, key=_place):
        yield _row([f"{row.setting.stages} × {row.setting.microbatches}", *cells(rows, row)])
    yield f"\n`wantrain bench network` prints it{_where(*(step for row in rows for step in row.steps))}.\n"


def _place(row: NetworkRow) -> tuple[object, ...]:
    one = row.setting
    return one.model, one.stages, one.microbatches, -one.uplink_bytes_per_s, one.latency_s


def link_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of what a channel carries over a link, beside a single connection."""
    last = newest(records, lambda one: (one["topology"], one["bytes"], one["count"], one["dilation"]))
    yield "Mbit/s of payload over one link (median):\n"
    yield _row(["topology", "payloads", "in a row", "a single one", "connections", "one connection, in a row"])
    yield _row(["---"] * 6)
    for record in last:
        channel, alone = record["channel"], record["one_connection"]
        yield _row(
            [
                Path(record["topology"]).stem,
                f"{record['count']} × {record['bytes'] / 1e6:g} MB",
                f"{channel['row_mbit_per_s']['median']:.0f}",
                f"{channel['single_mbit_per_s']['median']:.0f}",
                str(channel["transport"]["num_connections"]),
                f"{alone['row_mbit_per_s']['median']:.0f}",
            ]
        )
    command = "wantrain emulate benchmarks/long_link.toml -- python benchmarks/bench_links.py"
    yield f"\n`{command}` prints it{_where(last[-1])}.\n"


def convergence_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of held-out losses with each codec; only the newest experiment's runs."""
    last = [one for one in records if one["experiment"] == records[-1]["experiment"]]
    seeds = len({one["seed"] for one in last})
    experiment = last[-1]["experiment"]
    yield (
        f"Held-out loss after fine-tuning a small GPT for {last[-1]['epochs']:g} epochs on {experiment['text']},"
        f" {seeds} seeds; lower is better:\n"
    )
    yield convergence_table(last)
    yield f"\n`python benchmarks/bench_convergence.py --data FILE` prints it{_where(last[-1])}.\n"


def prediction_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of whole jobs on the emulated WAN, each predicted before it ran."""
    rows, errors = [], []
    for run in stored_runs(records):
        error = run.predicted_s / run.measured_s - 1
        errors.append(abs(error))
        numbers = [f"{run.predicted_s:.3f}", f"{run.measured_s:.3f}", f"{error:+.1%}", f"{run.exposed_share:.0%}"]
        rows.append(_row([run.case.name, *numbers, f"{run.stolen:.0%}"]))
    yield (
        f"Seconds a step, predicted before the run and measured, {len(rows)} jobs: off by"
        f" {statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst. Stolen: the share of the"
        " processors' time that went to other machines meanwhile.\n"
    )
    yield _row(["job", "predicted", "measured", "error", "communication not hidden", "stolen"])
    yield _row(["---"] * 6)
    yield from rows
    yield f"\n`wantrain bench prediction` prints it{_where(records[-1])}.\n"


def planning_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of placements that ran beside each other, and what advice and break-even came to."""
    placements = [record for record in records if record["benchmark"] == "placement"]
    for record in newest(placements, lambda one: (one.get("model"), one.get("machines"))):
        yield from _placement_rows(record)
    found = {record["benchmark"]: record for record in records}
    if "break_even" in found:
        one = found["break_even"]
        predicted, measured = (format_bandwidth(one[key]) for key in ("predicted", "measured"))
        yield (
            f"`{one['codec']}` with kernels of the reference backend was said to pay below {predicted}; measured, the"
            f" curves cross at {measured} (`wantrain bench planning --break-even`).\n"
        )
    if "advice" in found:
        one = found["advice"]
        yield (
            f"What would help most, it was said: {one['advice']}. So changed, the step took {one['measured']:.1%} less"
            " (`wantrain bench planning --advice`).\n"
        )


def _placement_rows(record: Record) -> Iterator[str]:
    entries = record["entries"]
    workers = len(entries[0]["workers"])
    shape, command = "", "wantrain bench planning --placement"
    if record.get("model"):
        stages = entries[0]["stages"]
        shape = f", shapes of {record['model']}, {stages} stages × {workers // stages}"
        options = {key: record[key] for key in ("machines", "model", "microbatch_size", "batch_size")}
        options |= {"stages": stages, "replicas": workers // stages, "dilation": f"{record['dilation']:g}"}
        command += "".join(f" --{key.replace('_', '-')} {value}" for key, value in options.items())
    yield (
        f"{workers} workers of uneven speed in eight regions{shape}, one plan after the other with the same codecs, all"
        f" slowed {record['dilation']:g}×:\n"
    )
    yield _row(["placement", "predicted", "measured", "error", "times planned", "stolen", "busy"])
    yield _row(["---"] * 7)
    for one in entries:
        times = f"{one['step_s']['median'] / entries[0]['step_s']['median']:.2f}"
        yield _row([one["name"], *_predicted_and_measured(one), times, f"{one['stolen']:.0%}", _busy(one)])
    yield f"\n`{command}` prints it{_where(record)}.\n"


def _busy(entry: Record) -> str:
    """Return the share of the machine's processors that was in use; older records don't know it."""
    return f"{entry['busy']:.0%}" if "busy" in entry else ""


def data_parallel_rows(records: list[Record]) -> Iterator[str]:
    """Yield the tables of replicas that average their gradients, with and without codecs."""
    for last in newest(records, lambda one: (one["benchmark"], one["uplink"])):
        shape = (
            f"{last['stages']} stages × {last['replicas']} replicas"
            if last["stages"] > 1
            else f"{last['replicas']} whole models"
        )
        samples = f"{last.get('samples', 16)} samples a replica"
        yield f"{shape} of {last['model']} at {last['uplink']}, {samples}, seconds a step:\n"
        yield _row(["system", "predicted", "measured", "error", "speed", "stolen", "busy"])
        yield _row(["---"] * 7)
        first = last["entries"][0]["step_s"]["median"]
        for one in last["entries"]:
            speed = f"{first / one['step_s']['median']:.2f}×"
            yield _row([one["name"], *_predicted_and_measured(one), speed, f"{one['stolen']:.0%}", _busy(one)])
        given = f" --samples {last['samples']}" if last.get("samples", 16) != 16 else ""
        yield f"\n`wantrain bench data-parallel --only {last['benchmark']}{given}` prints it{_where(last)}.\n"


def _predicted_and_measured(entry: Record) -> list[str]:
    seen, said = entry["step_s"]["median"], entry["predicted_s"]
    return ["", f"{seen:.2f}", ""] if said is None else [f"{said:.2f}", f"{seen:.2f}", f"{said / seen - 1:+.1%}"]


def time_to_loss_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of how soon each system reaches a loss on each network."""
    last = [record for record in records if "experiment" in record][-1]
    experiment = last["experiment"]
    yield (
        f"{last['model']} trained from scratch on {experiment['text']} for {experiment['training']['steps']} steps with"
        " the very codecs; seconds are those of steps measured apart, of the same shapes on the emulated network.\n"
    )
    yield from bench_time_to_loss.table(records)
    yield f"\n`wantrain bench time-to-loss` prints it{_where(last)}.\n"


def hooks_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of how soon DDP reaches a loss with each hook."""
    last = [record for record in records if "experiment" in record][-1]
    each = last["experiment"]["training"]["batch_size"] // last["replicas"]
    yield (
        f"{last['model']} trained from scratch on {last['experiment']['text']} by torch's DDP, {last['replicas']}"
        f" processes with {each} samples each; seconds are those of steps measured apart, of the same shapes on the"
        " emulated network.\n"
    )
    yield from bench_hooks.table(records)
    yield f"\n`wantrain bench hooks` prints it{_where(last)}.\n"


def slow_network_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of what the published worldwide network costs a plan."""
    last = newest(records, lambda one: (one["layers"], one["batch"]))
    yield (
        "GPT-3 XL's layers on 64 V100s in eight regions (DT-FM's network), predicted seconds a step. Data centre:"
        " theirs as published, ours as planned here for the same machines. Independent: each pair has its own rate;"
        " shared: 2 Gbit/s a worker for all it sends and receives. Compressed: bits that hold for data seen once.\n"
    )
    kinds = ("independent raw", "independent compressed", "shared raw", "shared compressed")
    yield _row(["layers", "batch", "their data centre", "ours", *kinds])
    yield _row(["---"] * (4 + len(kinds)))
    for record in last:
        theirs, ours = record["their_data_centre_s"], record["data_centre_s"]
        found = [record[kind]["step_s"] for kind in kinds]
        shares = [f"{one:.1f} ({one / theirs:.2f}× theirs, {one / ours:.2f}× ours)" for one in found]
        yield _row([str(record["layers"]), str(record["batch"]), f"{theirs:.1f}", f"{ours:.1f}", *shares])
    yield f"\n`wantrain bench slow-network` prints it{_where(last[-1])}.\n"


def scheduler_rows(records: list[Record]) -> Iterator[str]:
    """Yield what is known of the plans: how far from the optimum, how fast."""
    found = {key: value for record in records for key, value in record.items() if key != "environment"}
    if "quality" in found:
        one = found["quality"]
        yield (
            f"{one['cases']} random cases of up to eight workers against an exact search: {one['optimal']:.0%} optimal,"
            f" {one['mean_gap']:.2%} off on average, {one['worst_gap']:.1%} at worst; the naive plan"
            f" {one['naive_mean_gap']:.0%} (`wantrain bench scheduler --quality 200`).\n"
        )
    if "replan" in found:
        one = found["replan"]
        moved, afresh = (format_bytes(one[key]) for key in ("moved_bytes", "fresh_moved_bytes"))
        yield (
            f"{one['cases']} such cases with a worker gone ({one['worker_gone']}) or a link ten times slower: steps of"
            f" the plan to go on with are {one['mean_longer']:.1%} longer than a fresh plan's on average,"
            f" {one['worst_longer']:.1%} at worst, and {moved} must move instead of {afresh}"
            f" (`wantrain bench scheduler --replan {one['cases']}`).\n"
        )
    if "scale" in found:
        yield _row(["workers", "seconds (of processor)", "memory", "stages × replicas", "naive", "sites together"])
        yield _row(["---"] * 6)
        for one in found["scale"]:
            took = f"{one['wall_s']:.1f} ({one['processor_s']:.1f})"
            others = [f"{one[key] / one['step_s']:.2f}×" if one[key] else "" for key in ("naive_s", "together_s")]
            shape = " × ".join(map(str, one["shape"]))
            yield _row([str(one["workers"]), took, f"{one['peak_gb']:.1f} GB", shape, *others])
        yield f"\n`wantrain bench scheduler --scale` prints it{_where(records[-1])}.\n"
    if "dtfm" in found:
        yield _row(["DT-FM's scenario", "best known", "here", "processor s, cold and warm"])
        yield _row(["---"] * 4)
        for one in found["dtfm"]:
            seconds = ", ".join(f"{each:.1f}" for each in one["processor_s"])
            yield _row([one["scenario"], f"{one['best_known']:g}", f"{one['cost']:.4f}", seconds])
        yield "\n`wantrain bench scheduler --dtfm` prints it.\n"


def kernel_rows(name: str, records: list[Record]) -> Iterator[str]:
    """Yield the table of kernels beside a copy; the newest run's."""
    last = records[-1]
    yield (
        "Speed as a share of a copy that moves as many bytes, by operation and bits"
        f"{', on ' + last['gpu'] if last.get('gpu') else ''}:\n"
    )
    for title, speeds in kernel_speeds(last).items():
        widths = sorted({one.bits for one in speeds})
        yield _row([title, *(f"{bits} bits" for bits in widths)])
        yield _row(["---"] * (1 + len(widths)))
        for operation in dict.fromkeys(one.operation for one in speeds):
            own = {one.bits: f"{one.share:.0%}" for one in speeds if one.operation == operation}
            yield _row([operation, *(own.get(bits, "") for bits in widths)])
        yield ""
    yield f"`wantrain bench {name}` prints it{_where(last)}.\n"


def gpu_pipeline_rows(records: list[Record]) -> Iterator[str]:
    """Yield the table of a real GPT whose stages share one GPU."""
    last = newest(records, lambda one: (one["model"], one["microbatches"], one["network"], one["system"]))
    yield "A real GPT, each stage a process, all on one GPU; seconds a step:\n"
    yield _row(["model", "stages × microbatches", "network", "system", "step s", "spread", "first visit"])
    yield _row(["---"] * 7)
    for one in last:
        step = one["step_s"]
        shape = f"{one['stages']} × {one['microbatches']}, {one['dtype']}"
        spread = f"{step['min']:.2f}–{step['max']:.2f}"
        seconds = [f"{step['median']:.2f}", spread, f"{one['first_s']:.2f}"]
        yield _row([one["model"], shape, one["network"], one["system"], *seconds])
    yield f"\n`wantrain bench gpu-pipeline` prints it, on {last[-1].get('gpu', 'a processor')}{_where(last[-1])}.\n"


def published_rows(records: list[Record]) -> Iterator[str]:
    """Yield what the simulator says of the scheduler's published runs, case by case."""
    last = records[-1]
    cells = [Cell(**cell) for cell in last["cells"]]
    yield (
        f"DT-FM's published runs on {len({cell.case for cell in cells})} networks, GPT-3 XL's layers on 64 V100s: one"
        f" speed ({last['flops_per_s'] / 1e12:.1f} TFLOP/s) is fitted to the scheduled runs in the data centre, all"
        " else follows. Seconds an iteration, measured by them and predicted here; the median error of each case:\n"
    )
    yield _row(["case", "variant", "measured", "predicted", "median error"])
    yield _row(["---"] * 5)
    for kind, error in medians(cells).items():
        case, variant = kind.split(" ")
        own = [cell for cell in cells if (cell.case, cell.variant) == (case, variant)]
        ranges = [
            f"{min(seconds):.1f} – {max(seconds):.1f}"
            for seconds in ([cell.measured_s for cell in own], [cell.predicted_s for cell in own])
        ]
        yield _row([case, variant, *ranges, f"{error:.1%}"])
    yield f"\n`wantrain bench published` prints it, run by run{_where(last)}.\n"


def profile_rows(records: list[Record]) -> Iterator[str]:
    """Yield how near measured links came to an emulated network that is known."""
    last = records[-1]
    rates, latencies = last["rate_error"], last["latency_error_s"]
    yield (
        f"`wantrain profile --links` on an emulated network with two shared lines: {len(last['pairs'])} pairs in"
        f" {last['seconds']:.0f} s, rates off by {rates['median']:.2%} in the median and {rates['max']:.2%} at most,"
        f" latencies by {latencies['max'] * 1e6:.0f} µs at most; shared lines found:"
        f" {len(last['shared_found'])} of {len(last['shared_asked'])} (`wantrain bench profile`{_where(last)}).\n"
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _where(*records: Record) -> str:
    """Say where and when records were measured: each machine with its last day."""
    days: dict[str, str] = {}
    for machine in sorted((record["environment"] for record in records), key=lambda one: str(one["when"])):
        days[f"{machine['cores']} cores, {machine['processor']}, torch {machine['torch']}"] = machine["when"][:10]
    return f" (here: {'; '.join(f'{machine}, {day}' for machine, day in days.items())})"


SECTIONS: dict[str, tuple[str, Callable[[list[Record]], Iterator[str]]]] = {
    "network": ("What the network costs", network_rows),
    "data_parallel": ("What averaging gradients costs", data_parallel_rows),
    "prediction": ("Predicted and measured", prediction_rows),
    "planning": ("Placement", planning_rows),
    "slow_network": ("A network a hundred times slower", slow_network_rows),
    "scheduler": ("The scheduler", scheduler_rows),
    "published": ("Published runs", published_rows),
    "profile": ("Measuring a network", profile_rows),
    "links": ("Links", link_rows),
    "gpu_pipeline": ("A real GPT on one GPU", gpu_pipeline_rows),
    "kernels_gpu": ("Kernels on a GPU", partial(kernel_rows, "kernels")),
    "kernels_cpu": ("Kernels on the processor", partial(kernel_rows, "kernels-cpu")),
    "convergence": ("Losses", convergence_rows),
    "time_to_loss": ("How soon a loss is reached", time_to_loss_rows),
    "hooks": ("How soon DDP reaches a loss with each hook", hooks_rows),
}
"""By result file: the title, and what makes its table."""
