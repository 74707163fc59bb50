"""An endpoint on every worker that Prometheus scrapes: http://ADDRESS:PORT/metrics.

Rank r listens on port + r, so that workers of one machine don't meet. Each leaves its address in the run directory, as
a file that Prometheus' `file_sd_configs` reads (`prometheus/rank-0.json`), for as long as it answers there.

What is counted (seconds, bytes, tokens) counts from the process's start and only grows, as Prometheus wants it; rates
are its business. Figures are made when somebody asks for them: a step costs a few additions.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wantrain.errors import ConfigError
from wantrain.fact import write_text
from wantrain.run_directory import StepRecord, ValidationRecord
from wantrain.training.metrics import RunFacts

_ANY = ("0.0.0.0", "::", "")


class _Metric(NamedTuple):
    kind: str
    help: str
    labels: tuple[str, ...] = ()


_METRICS = {
    "loss": _Metric("gauge", "loss of the last step, nats per token (rank 0)"),
    "held_out_loss": _Metric("gauge", "loss of the last validation, nats per token (rank 0)"),
    "grad_norm": _Metric("gauge", "norm of the whole gradient before clipping (rank 0)"),
    "learning_rate": _Metric("gauge", "learning rate of the last step (rank 0)"),
    "tokens": _Metric("counter", "tokens that the whole job trained on (rank 0)"),
    "step": _Metric("gauge", "number of the last step, counted from 0"),
    "steps": _Metric("counter", "steps done by this process"),
    "last_step_seconds": _Metric("gauge", "seconds that the last step took"),
    "finished_timestamp_seconds": _Metric("gauge", "wall clock at the end of the last step"),
    "step_seconds": _Metric("counter", "seconds spent in steps"),
    "compute_seconds": _Metric("counter", "seconds spent in forwards and backwards"),
    "wait_seconds": _Metric("counter", "seconds spent waiting for a peer", ("peer",)),
    "sent_bytes": _Metric("counter", "bytes sent to a peer", ("peer",)),
    "uncompressed_bytes": _Metric("counter", "bytes that were sent to a peer before their codec", ("peer",)),
    "link_busy_seconds": _Metric("counter", "seconds for which the link to a peer was under way", ("peer",)),
    "codec_error": _Metric("gauge", "relative error of the last measured payload", ("peer", "way")),
    "codec_bits": _Metric("gauge", "bits per value of the last measured payload", ("peer", "way")),
}


class Prometheus:
    """Serves what a rank has done so far, in a thread of its own."""

    def __init__(self, port: int = 9464, address: str = "127.0.0.1") -> None:
        """Listen at an address of this host, on port + rank; port 0 takes any that is free."""
        try:
            import prometheus_client
            import prometheus_client.core
        except ImportError:
            raise ConfigError(
                "Prometheus needs the package prometheus_client (not installed); run pip install 'wantrain[watch]'"
            ) from None
        self._client: Any = prometheus_client
        self._port, self._address = port, address
        self._values: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        self._lock = threading.Lock()
        self._file: Path | None = None
        self.port = 0
        """Where it listens, once it has begun."""

    def begin(self, facts: RunFacts) -> None:
        """Begin to answer; raise ConfigError where the address or the port can't be had."""
        self._is_first = facts.is_first
        self._common = (facts.name, facts.worker)
        registry = self._client.CollectorRegistry(auto_describe=False)
        registry.register(self)
        port = self._port + facts.rank if self._port else 0
        try:
            self._server, self._thread = self._client.start_http_server(port, self._address, registry)
        except OSError as caught:
            reason = (caught.strerror or str(caught)).lower()
            raise ConfigError(
                f"can't serve metrics on {self._address}:{port} ({reason}); choose another [watch.prometheus] port"
            ) from None
        self.port = self._server.server_port
        if facts.folder is not None:
            self._file = facts.folder / "prometheus" / f"rank-{facts.rank}.json"
            write_text(self._file, json.dumps([{"targets": [f"{self._host(facts)}:{self.port}"]}]) + "\n")

    def _host(self, facts: RunFacts) -> str:
        """Return by which address this endpoint is reached."""
        return self._address if self._address not in _ANY else facts.address or socket.gethostname()

    def step(self, record: StepRecord) -> None:
        """Count a step."""
        with self._lock:
            if self._is_first:
                for name in ("loss", "grad_norm", "learning_rate"):
                    self._set(name, getattr(record, name))
                self._add("tokens", record.tokens)
            self._set("step", record.step)
            self._add("steps", 1)
            self._set("last_step_seconds", record.step_s)
            self._set("finished_timestamp_seconds", record.finished_at)
            self._add("step_seconds", record.step_s)
            self._add("compute_seconds", record.compute_s)
            self._count_peers(record)

    def _count_peers(self, record: StepRecord) -> None:
        for peer, seconds in record.waited_s.items():
            self._add("wait_seconds", seconds, peer)
        for peer, sent in record.sent.items():
            self._add("sent_bytes", sent.wire_bytes, peer)
            self._add("uncompressed_bytes", sent.raw_bytes, peer)
            self._add("link_busy_seconds", sent.busy_s, peer)
        for name, lost in record.codecs.items():
            peer, _, way = name.partition("/")
            self._set("codec_error", lost.relative_error, peer, way)
            self._set("codec_bits", lost.bits, peer, way)

    def validation(self, record: ValidationRecord) -> None:
        """Keep the held-out loss."""
        if self._is_first:
            with self._lock:
                self._set("held_out_loss", record.validation_loss)

    def note(self, text: str) -> None:
        """Notes are no figures: they are in the run directory."""

    def close(self) -> None:
        """Answer no more, and say so to who looks for workers in the run directory."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._values[name][labels] = value

    def _add(self, name: str, value: float, *labels: str) -> None:
        values = self._values[name]
        values[labels] = values.get(labels, 0.0) + value

    def collect(self) -> Iterator[Any]:
        """Yield what there is, for `prometheus_client`."""
        with self._lock:
            now = {name: dict(values) for name, values in self._values.items()}
        for name, values in now.items():
            yield self._family(name, _METRICS[name], values)

    def _family(self, name: str, metric: _Metric, values: dict[tuple[str, ...], float]) -> Any:
        core = self._client.core
        kind = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
        labels: Sequence[str] = ("run", "worker", *metric.labels)
        family = kind(f"wantrain_{name}", metric.help, labels=labels)
        for own, value in values.items():
            family.add_metric((*self._common, *own), value)
        return family
