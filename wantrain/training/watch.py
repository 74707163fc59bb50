"""Hand a rank's figures to its sinks, so that no sink can slow or end training.

                      ┌─► RunLines: at once, a line each (the run's own record; some ten microseconds)
    loop ──► Watch ───┤
                      └─► a queue each ──► a thread each ──► TensorBoard, W&B, Prometheus, your own

The loop only puts a finished fact into a queue. Of a sink that raises this is said once, and it is left alone from
then on; one that is too slow loses what its queue has no room for, which is said once too; at the end all of them
together get a few seconds. Only a sink's beginning may end a run: what was asked for is there, or refused at once.

Outside sinks are found by name, as the command line finds its handlers: training stands below the integrations and
knows none of them, and a package is loaded only where a run file asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

from pydantic import BaseModel

from wantrain.config import WatchConfig
from wantrain.errors import ConfigError
from wantrain.pipeline.recorder import Recorder
from wantrain.run_directory import StepRecord, ValidationRecord
from wantrain.training.metrics import MetricsSink, RunFacts, RunLines

_BACKLOG = 1000
"""Chosen: some steps of a short hiccup, and a few megabytes at most."""

_CLOSE_WITHIN_S = 20.0
"""Chosen: enough to send what is left, little beside a run."""

_FAILED_CLOSE_WITHIN_S = 3.0
"""Chosen: a run that has failed says why first of all."""

_Call = Callable[[MetricsSink], None]


class _Outside(NamedTuple):
    """A sink that a run file can ask for: the package that it needs, and where its class is."""

    package: str
    place: str


_OUTSIDE = {
    "tensorboard": _Outside("tensorboard", "wantrain.integrations.tensorboard:TensorBoard"),
    "wandb": _Outside("wandb", "wantrain.integrations.wandb:WeightsAndBiases"),
    "prometheus": _Outside("prometheus_client", "wantrain.integrations.prometheus:Prometheus"),
}


def _asked_for(config: WatchConfig) -> Iterator[tuple[str, BaseModel]]:
    for name in _OUTSIDE:
        table = getattr(config, name)
        if table is not None:
            yield name, table


def check_sinks(config: WatchConfig) -> None:
    """Raise ConfigError where the run file asks for a sink whose package isn't installed."""
    for name, _ in _asked_for(config):
        package = _OUTSIDE[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"[watch.{name}] needs the package {package} (not installed); run pip install 'wantrain[watch]'"
            )


def check_reach(config: WatchConfig) -> None:
    """Raise ConfigError for sinks that need a way out of the emulated network, which has none."""
    if config.prometheus is not None:
        raise ConfigError(
            "[watch.prometheus] can't be scraped inside the emulated network; watch with 'wantrain top',"
            " or launch with --no-emulation"
        )
    if config.wandb is not None and config.wandb.mode == "online":
        raise ConfigError(
            '[watch.wandb] reaches no server from inside the emulated network; set mode = "offline",'
            " or launch with --no-emulation"
        )


def make_sinks(config: WatchConfig) -> list[MetricsSink]:
    """Return the outside sinks that the run file asks for, not begun yet; raise ConfigError as `check_sinks` does."""
    check_sinks(config)
    sinks = []
    for name, table in _asked_for(config):
        module, _, kind = _OUTSIDE[name].place.partition(":")
        sinks.append(getattr(importlib.import_module(module), kind)(**table.model_dump()))
    return sinks


class _Guarded:
    """A sink that may fail: its first error is said, it is closed as far as it can be, and asked nothing more."""

    def __init__(self, sink: MetricsSink, say: Callable[[str], None]) -> None:
        self.name, self._sink, self._say = type(sink).__name__, sink, say
        self.has_failed = False

    def tell(self, call: _Call) -> None:
        """Call the sink."""
        if self.has_failed:
            return
        try:
            call(self._sink)
        except Exception as caught:  # noqa: BLE001  the sink's edge: whatever it raises, training goes on
            self.has_failed = True
            reason = " ".join(str(caught).split()) or type(caught).__name__
            self._say(f"{self.name} failed ({reason}); training goes on without it")
            with suppress(Exception):
                self._sink.close()


class _InBackground(_Guarded):
    """A guarded sink in a thread of its own."""

    def __init__(self, sink: MetricsSink, say: Callable[[str], None]) -> None:
        super().__init__(sink, say)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._has_dropped = False
        self._thread = threading.Thread(target=self._work, name=f"wantrain-{self.name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            super().tell(call)

    def tell(self, call: _Call) -> None:
        """Put a call of the sink into its queue."""
        if self._calls.qsize() < _BACKLOG:
            self._calls.put(call)
        elif not self._has_dropped:
            self._has_dropped = True
            self._say(f"{self.name} is {_BACKLOG} records behind; what its queue has no room for is dropped")

    def ask_to_close(self) -> None:
        """Have the sink do what is left, and close."""
        self._calls.put(lambda sink: sink.close())
        self._calls.put(None)

    def await_close(self, deadline_s: float) -> None:
        """Wait for it; say so where it takes longer than allowed."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"{self.name} did not come to its end in time; its last records may be missing")


class Watch:
    """One rank's sinks, begun; whoever trains tells it everything once."""

    def __init__(self, facts: RunFacts, sinks: Sequence[MetricsSink] = (), lines: RunLines | None = None) -> None:
        """Begin all of them, the run directory's `lines` first.

        Raises ConfigError where one can't be had; those begun before it are closed again.
        """
        self._facts, self._lines = facts, lines
        self._own = [] if lines is None else [_Guarded(lines, self._say)]
        self._outside: list[_InBackground] = []
        if lines is not None:
            lines.begin(facts)
        try:
            for sink in sinks:
                sink.begin(facts)
                self._outside.append(_InBackground(sink, self._say))
        except BaseException:
            self.close(has_failed=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(has_failed=error is not None)

    @property
    def is_asked(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._own or self._outside)

    def step(self, record: StepRecord) -> None:
        """Hand a step to every sink."""
        self._tell(lambda sink: sink.step(record))

    def validation(self, record: ValidationRecord) -> None:
        """Hand a held-out loss to every sink."""
        self._tell(lambda sink: sink.validation(record))

    def note(self, text: str) -> None:
        """Say a line to the user, and hand it to every sink."""
        print(text, file=sys.stderr, flush=True)
        self._tell(lambda sink: sink.note(text))

    def timeline(self, step: int, recorder: Recorder) -> None:
        """Write a step's events into the run directory, where there is one."""
        lines = self._lines
        if lines is not None:
            self._own[0].tell(lambda _: lines.timeline(step, recorder))

    def close(self, has_failed: bool = False) -> None:
        """Close every sink; after a failed run there is little time for it."""
        deadline_s = time.monotonic() + (_FAILED_CLOSE_WITHIN_S if has_failed else _CLOSE_WITHIN_S)
        for sink in self._outside:
            sink.ask_to_close()
        for sink in self._outside:
            sink.await_close(deadline_s)
        self._outside = []

    def _tell(self, call: _Call) -> None:
        for sink in (*self._own, *self._outside):
            sink.tell(call)

    def _say(self, text: str) -> None:
        """Say what became of a sink, where the run directory can still be written there too."""
        said = f"{self._facts.worker}: {text}"
        print(said, file=sys.stderr, flush=True)
        if self._lines is not None:
            with suppress(Exception):
                self._lines.note(said)
