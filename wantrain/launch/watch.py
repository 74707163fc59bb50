"""What every launcher does once its workers run: show how it goes, end it together, say who failed, sum up.

A launcher hands in something like a `Popen` for each worker, and a run directory into which the workers' metrics, notes
and logs come, from this machine or from others. Ctrl-C asks for an agreed last step; a second one ends everything.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from wantrain.config import RunConfig
from wantrain.errors import ConfigError, RunError, UserError, WantrainError
from wantrain.fact import read_json
from wantrain.launch.progress import Progress
from wantrain.launch.tail import Tail
from wantrain.plan import Plan
from wantrain.run_directory import RunDirectory
from wantrain.training.job import judged, open_data, profile_of, write_summary
from wantrain.trigram import trigram_loss

_POLL_S = 0.25
_OTHERS_WITHIN_S = 5.0
"""Chosen: torchrun looks at its worker ten times a second, and takes a second or two to say how it ended."""

_TORCHRUN_EXIT = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")
"""How torchrun's own account of a failure names rank and exit status."""

END_WITHIN_S = 20.0
"""Chosen: a worker that was told to end and has not by then is killed."""


class Process(Protocol):
    """A worker's torchrun, here or elsewhere: the part of `subprocess.Popen` that launchers use."""

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raise subprocess.TimeoutExpired."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


def follow(
    run: RunDirectory,
    plan: Plan,
    config: RunConfig,
    workers: Mapping[str, Process],
    *,
    ask_to_stop: Callable[[], None],
    check: Callable[[], None] = lambda: None,
    why_lost: Callable[[str], str] = lambda _: "",
    said: Callable[[], Iterable[str]] | None = None,
    first_step: int = 0,
) -> bool:
    """Show progress until all workers have ended; return whether the user interrupted.

    `check` raises what else may be wrong; `why_lost` says why nothing can be heard of a worker any more; `said` gives
    the new lines to show above the progress, by default the run's notes. Raise the error of the worker that failed
    first, KeyboardInterrupt at a second Ctrl-C.
    """
    interrupts = _count_interrupts()
    asked, said = False, said or _new_notes(run)
    with Progress(run, plan, config.training.steps, first_step) as progress:
        while any(worker.poll() is None for worker in workers.values()):
            progress.update()
            for line in said():
                progress.note(line)
            check()
            _raise_if_failed(run, plan, workers, why_lost)
            if interrupts and not asked:
                ask_to_stop()
                progress.note("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
                asked = True
            if len(interrupts) > 1:
                raise KeyboardInterrupt
            time.sleep(_POLL_S)
        progress.update()
        for line in said():
            progress.note(line)
    _raise_if_failed(run, plan, workers, why_lost)
    return bool(read_json(run.summary, ConfigError).get("interrupted"))


def sum_up(run: RunDirectory, config: RunConfig, plan: Plan, dilation: float = 1.0) -> None:
    """Write the run's figures, and the trigram model's loss on the very tokens that the model was judged on."""
    _, samples, held_out = open_data(config)
    trigram = trigram_loss(samples, judged(held_out, plan), config.model.vocab_size)
    write_figures(run, config, plan, dilation, trigram_loss=round(trigram, 4))


def write_page(run: RunDirectory) -> None:
    """Write the run's page; its pictures load matplotlib, which no start waits for."""
    from wantrain.report.page import write_report

    write_report(run)


def write_figures(run: RunDirectory, config: RunConfig, plan: Plan, dilation: float, **more: object) -> None:
    """Write the run's figures as far as its metrics tell them."""
    steps = run.read_steps(0)
    seconds = sum(record.step_s for record in steps)
    write_summary(
        run,
        seconds=round(seconds, 3),
        tokens_per_s=round(sum(record.tokens for record in steps) / seconds, 1) if seconds else 0.0,
        parameters=profile_of(config).parameter_bytes // 4,
        workers=plan.world_size,
        machine=f"{len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        dilation=dilation,
        **more,
    )


def end(workers: Iterable[Process], within_s: float) -> None:
    """End what still runs: ask, wait, kill."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + within_s
    for worker in running:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _new_notes(run: RunDirectory) -> Callable[[], list[str]]:
    """Return what gives the notes that were added since it was last called."""
    tail = Tail(run.notes)
    tail.read_bytes()
    return lambda: tail.read_bytes().decode().splitlines()


def _count_interrupts() -> list[int]:
    """From now on, note SIGINT and SIGTERM in the list that is returned instead of dying of them."""
    seen: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: seen.append(number))
    return seen


def _raise_if_failed(
    run: RunDirectory, plan: Plan, workers: Mapping[str, Process], why_lost: Callable[[str], str]
) -> None:
    """Raise the error of the worker that failed for a reason of its own, once one has ended badly."""
    if not any(worker.poll() for worker in workers.values()):
        return
    deadline = time.monotonic() + _OTHERS_WITHIN_S  # who lost a peer often ends before the peer's own torchrun does
    while any(worker.poll() is None for worker in workers.values()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    ended = {name: status for name, worker in workers.items() if (status := worker.poll())}
    failures = [_failure(run, plan, name, status, why_lost(name)) for name, status in ended.items()]
    raise min(failures, key=lambda failure: failure[0])[1]


def _failure(run: RunDirectory, plan: Plan, name: str, status: int, lost: str) -> tuple[int, WantrainError]:
    """Return a worker's error from its log, and how far it is from a cause: a kill, bad input, a lost peer.

    `status` is that of the process that was started: torchrun, which tells in its log how the worker ended, or the
    worker itself.
    """
    log = run.logs / f"{name}.log"
    if lost:
        return 0, RunError(f"worker '{name}' is gone: {lost}; go on with --resume (its log: {log})")
    text = log.read_text(errors="replace")
    said = [line.removeprefix("wantrain: ") for line in text.splitlines() if line.startswith("wantrain: ")]
    exits = [(int(one), int(rank)) for rank, one in _TORCHRUN_EXIT.findall(text)]
    if not exits and name in plan.workers:
        exits = [(status, plan.rank_of(name))]
    killed = [(-one, rank) for one, rank in exits if one < 0 and -one != signal.SIGTERM]
    if killed:
        number, rank = killed[0]
        victim = name if name in plan.workers else plan.workers[rank]
        return 0, RunError(f"worker '{victim}' was killed (signal {number}); go on with --resume (its log: {log})")
    reason = said[0] if said else f"its log, {log}, says why"
    if any(one == UserError.exit_status for one, _ in exits):
        return 1, UserError(f"worker '{name}' ended: {reason}")
    return 2, RunError(f"worker '{name}' failed: {reason}; go on with --resume (its log: {log})")
