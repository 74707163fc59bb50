"""How tests share a machine: which run with no other beside them, and what a busy machine is forgiven.

`make test` runs tests in several processes. A test that is judged by a clock (`alone`, and every `measured` one) comes
after all others, and waits until no other test runs on this checkout; meanwhile none begins.

Tests of measured figures (`measured`) meet machines whose processors others use too. Such a test is repeated twice. If
it fails then as well, and the kernel counts more than a little of that time as stolen (given to other virtual
machines), it is skipped and says how much was: what it measured was not this machine alone. Functions are timed by what
they promise, so a machine to itself gets no such grace.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import ProcessorTime
from tests.watched import watched

__all__ = ["watched"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which transformers does, say

_MOST_WORKERS = 8
"""Chosen: each takes a GB at times, and the tests that run alone leave more of them with nothing to do."""

_NUM_RERUNS = 2
_RERUN_DELAY_S = 5
_STOLEN_SHARE = 0.02
"""Chosen: 2 % is one 20 ms pause a second, more than any latency that is judged here may be off by."""

_BEGAN = pytest.StashKey[ProcessorTime]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Say how many processes `-n auto` is."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Give the threads of one operation no processor that another process of the tests has."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("measured"):
            item.add_marker(pytest.mark.flaky(reruns=_NUM_RERUNS, reruns_delay=_RERUN_DELAY_S))
    items.sort(key=_is_alone)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _in_company(item.config.rootpath, alone=_is_alone(item)):
        return (yield)


def _is_alone(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("alone", "measured"))


@contextlib.contextmanager
def _in_company(checkout: Path, alone: bool) -> Iterator[None]:
    """Wait until nobody is in the room, or nobody who must be alone; who waits at the door lets nobody in before."""
    mark = hashlib.sha256(os.fsencode(checkout)).hexdigest()[:12]
    path = Path(tempfile.gettempdir(), f"wantrain-{os.getuid()}-tests-{mark}")
    with path.with_suffix(".door").open("w") as door, path.with_suffix(".room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # not by closing: a process that a test left would hold it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEGAN] = ProcessorTime.now()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_last = getattr(item, "execution_count", 1) > _NUM_RERUNS
    if report.when == "call" and report.failed and is_last and item.get_closest_marker("measured"):
        share = ProcessorTime.now().stolen_since(item.stash[_BEGAN])
        if share > _STOLEN_SHARE:
            path, line, _ = item.location
            why = f"not this machine alone: {share:.0%} of its processors' time was stolen; {call.excinfo!r}"
            report.outcome, report.longrepr = "skipped", (path, line or 0, why)
    return report
