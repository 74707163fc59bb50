"""How a running job is getting on, in the terminal of whoever started it.

All is read from the run directory, where the workers write their metrics anyway: nothing is asked of them, so looking
costs the job nothing. Only what was added since the last look is read. No thread: the launcher's own loop calls
`update` a few times a second.

    step 42/300 ━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 14 %, 3:21 left
    loss 2.134   held out 2.201   6,012 tokens/s   busiest paris-0→tokyo-0 71 %

Where there is no terminal, a plain line every ten seconds says the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wantrain.launch.tail import Tail
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory, StepRecord
from wantrain.units import format_time

PLAIN_EVERY_S = 10.0
"""Chosen: often enough to see that it lives, seldom enough for a log."""

WINDOW = 20
"""Chosen: rates are over this many steps, so that they neither flicker nor lag."""


class Progress:
    """Shows a job's progress from `with` to the end of its block; `first_step` is where a resumed run goes on."""

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._workers, self._num_steps, self._first_step, self._clock = plan.workers, num_steps, first_step, clock
        self._console = console or Console(stderr=True)
        self._tails = [Tail(run.metrics(rank)) for rank in range(plan.world_size)]
        self._recent: list[deque[StepRecord]] = [deque(maxlen=WINDOW) for _ in self._workers]
        self._began_at = self._printed_at = clock()
        self._num_done = first_step
        self._held_out: float | None = None
        self._printed = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read()
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
        elif self._num_done > self._first_step:
            self._print_plain()

    def update(self) -> None:
        """Read what is new and show it."""
        self._read()
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        elif self._clock() - self._printed_at >= PLAIN_EVERY_S:
            self._print_plain()

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(Text(text))

    def _read(self) -> None:
        for rank, tail in enumerate(self._tails):
            lines = tail.read()
            if tail.restarted:
                self._forget(rank)
            for i, line in enumerate(lines):
                self._take(rank, line, is_recent=i >= len(lines) - 2 * WINDOW)

    def _forget(self, rank: int) -> None:
        self._recent[rank].clear()
        if rank == 0:
            self._num_done, self._held_out = self._first_step, None

    def _take(self, rank: int, line: dict[str, Any], is_recent: bool) -> None:
        """Count a line; keep it if it may matter to the rates, since a resumed run may begin with 100 000 others."""
        if "validation_loss" in line:
            self._held_out = line["validation_loss"]
        elif line["step"] >= self._first_step:
            self._num_done += rank == 0
            if is_recent:
                self._recent[rank].append(StepRecord.model_validate(line))

    def _of_this_start(self, rank: int) -> list[StepRecord]:
        """Return a rank's recent steps, without those from before a resumed run went on."""
        return [record for record in self._recent[rank] if record.finished_at >= self._began_at]

    @property
    def tokens_per_s(self) -> float | None:
        """Training speed over the recent steps."""
        records = self._of_this_start(0)
        seconds = sum(record.step_s for record in records)
        return sum(record.tokens for record in records) / seconds if seconds else None

    @property
    def left_s(self) -> float | None:
        """Wall-clock seconds to the last step, at the recent steps' pace; validations and checkpoints count."""
        records = self._of_this_start(0)
        if len(records) < 2:
            return None
        pace_s = (records[-1].finished_at - records[0].finished_at) / (len(records) - 1)
        return pace_s * (self._num_steps - self._num_done)

    @property
    def busiest_link(self) -> tuple[str, str, float] | None:
        """The link that was under way for the greatest share of the recent steps: from, to, share."""
        return max(self._link_shares(), key=lambda link: link[2], default=None)

    def _link_shares(self) -> Iterator[tuple[str, str, float]]:
        for rank, worker in enumerate(self._workers):
            records = self._of_this_start(rank)
            seconds = sum(record.step_s for record in records)
            for peer in {peer for record in records for peer in record.sent} if seconds else ():
                busy_s = sum(record.sent[peer].busy_s for record in records if peer in record.sent)
                yield worker, peer, busy_s / seconds

    def _figures(self) -> list[str]:
        """Say loss, held-out loss, speed and the busiest link, as far as they are known."""
        records = self._recent[0]
        out = [f"loss {records[-1].loss:.3f}"] if records else []
        out += [f"held out {self._held_out:.3f}"] if self._held_out is not None else []
        out += [f"{self.tokens_per_s:,.0f} tokens/s"] if self.tokens_per_s else []
        if self.busiest_link is not None:
            source, target, share = self.busiest_link
            out.append(f"busiest {source}→{target} {100 * share:.0f} %")
        return out

    def _left(self) -> list[str]:
        return [] if not self.left_s else [f"{format_time(max(1, round(self.left_s)))} left"]

    def _print_plain(self) -> None:
        line = ", ".join([f"step {self._num_done}/{self._num_steps}", *self._figures(), *self._left()])
        if not self._recent[0]:
            line = f"waiting for the first step, {format_time(round(self._clock() - self._began_at))} so far"
        if line != self._printed:
            self._console.print(Text(line), soft_wrap=True)
        self._printed, self._printed_at = line, self._clock()

    def _render(self) -> Group:
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        share = ", ".join([f"{100 * self._num_done / max(1, self._num_steps):.0f} %", *self._left()])
        bar.add_row(
            Text(f"step {self._num_done}/{self._num_steps}", style="bold"),
            ProgressBar(total=self._num_steps, completed=self._num_done),
            Text(share),
        )
        figures = self._figures() or ["waiting for the first step"]
        return Group(bar, Text("   ".join(figures), style="cyan"))
