"""What a sweep measured, by setting and system, and the cells of the table that says so."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from network_setting import AUTO, Codecs, Setting, System
from wantrain.units import format_bytes
from wantrain.wire import payload_bytes

NAME = "network"
"""Of the result file, and of its records."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A system in a setting: its steps so far, and what they are held against."""

    setting: Setting
    system: System
    steps: tuple[Record, ...]

    @property
    def step_s(self) -> float:
        """The median of the undilated steps."""
        return statistics.median(self.seconds)

    @property
    def seconds(self) -> list[float]:
        return [record["step_s"] for record in self.steps]

    @property
    def codecs(self) -> Codecs:
        """What it sent with; a plan's own choice as it was."""
        found: Codecs | None = self.steps[-1].get("codecs")
        return found or self.setting.codecs(self.system)

    @property
    def title(self) -> str:
        """The system's name, with the codecs that its plan chose: each way's least and widest."""
        if self.system.forward != AUTO.forward:
            return self.system.name
        ways = ({one[way] for one in self.codecs} for way in (0, 1))
        ranges = [sorted(way, key=lambda codec: payload_bytes(codec, (1, 1024))) for way in ways]
        return f"{self.system.name} ({'/'.join('…'.join(dict.fromkeys((one[0], one[-1]))) for one in ranges)})"

    @property
    def bound_s(self) -> float:
        return self.setting.bound_s(self.system, self.codecs)

    @property
    def predicted_s(self) -> float | None:
        """What the cost model says; None for another's program."""
        found: float | None = self.steps[-1].get("predicted_s")
        return found

    @property
    def processor_s(self) -> float:
        """Undilated processor seconds of a step, the busiest rank's."""
        middle: float = statistics.median(max(record["processor_s"]) for record in self.steps)
        return middle

    @property
    def stolen(self) -> float:
        """Share of the machine's processors that went to other machines during the worst of the steps."""
        worst: float = max(record["stolen"] for record in self.steps)
        return worst

    @property
    def payload_bytes(self) -> int:
        """Of a whole step, over all boundaries."""
        return sum(map(sum, self.setting.payloads(self.codecs))) * self.setting.microbatches


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return one row for each setting and system, in the order of their first steps; only the newest series counts."""
    found: dict[tuple[Setting, System], list[Record]] = {}
    for record in records:
        key = Setting(**record["setting"]), System.parse(record["system"])
        steps = found.setdefault(key, [])
        if steps and steps[-1]["series"] != record["series"]:
            steps.clear()
        steps.append(record)
    return [Row(*key, tuple(steps)) for key, steps in found.items()]


def most_work(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the most stages and microbatches: those that a headline is about."""
    most = max(((row.setting.stages, row.setting.microbatches) for row in rows), default=None)
    return [row for row in rows if (row.setting.stages, row.setting.microbatches) == most]


def reference(rows: Sequence[Row], row: Row) -> Row | None:
    """Return wantrain uncompressed at 10 Gbit/s, with the same work: what a slow network is held against."""
    raw = System.parse("raw")
    work = replace(row.setting, uplink_bytes_per_s=1.25e9, latency_s=0.0, dilation=0.0)
    return next((one for one in rows if one.system == raw and replace(one.setting, dilation=0.0) == work), None)


def best_peer_s(rows: Sequence[Row], row: Row) -> float | None:
    """Return the step of the fastest other program in the same setting."""
    return min((one.step_s for one in rows if one.setting == row.setting and one.system.is_peer), default=None)


HEAD = (
    "uplink", "system", "d", "step s", "spread", "n", "tokens/s", "of bound", "over 10G raw", "best peer", "sent",
    "predicted", "processor s", "stolen",
)  # fmt: skip
"""Of a row: dilation, seconds a step, least and greatest, number of steps, tokens per second, the bound over the step,
by how much it is slower than wantrain raw at 10 Gbit/s, how many times as long the best other program takes, bytes a
step, the predicted step, the busiest rank's processor seconds a step, undilated, and the share of the machine's
processors that others had meanwhile."""


def cells(rows: Sequence[Row], row: Row) -> list[str]:
    """Return a row as the table prints it, in the order of `HEAD`."""
    base, peer = reference(rows, row), best_peer_s(rows, row)
    return [
        row.setting.title,
        row.title,
        f"{row.setting.dilation:g}",
        f"{row.step_s:.2f}",
        f"{min(row.seconds):.2f}–{max(row.seconds):.2f}",
        str(len(row.steps)),
        f"{row.setting.tokens / row.step_s:.0f}",
        f"{row.bound_s / row.step_s:.0%}",
        f"{row.step_s / base.step_s - 1:+.0%}" if base else "",
        f"{peer / row.step_s:.2f}×" if peer else "",
        format_bytes(row.payload_bytes),
        f"{row.predicted_s:.2f}" if row.predicted_s else "",
        f"{row.processor_s:.2f}",
        f"{row.stolen:.0%}",
    ]
