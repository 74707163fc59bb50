"""The endpoints of a real run, read with Prometheus' own parser; and scraped by a real Prometheus, for Grafana."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import small_plan
from tests.watched import PATIENCE_S, Watched, WatchedRun, fetch
from wantrain.errors import ConfigError
from wantrain.integrations.prometheus import Prometheus
from wantrain.plan import Plan
from wantrain.resources import configs_folder
from wantrain.run_directory import CodecLoss, LinkTraffic, StepRecord, ValidationRecord
from wantrain.training.metrics import RunFacts

pytest.importorskip("prometheus_client")

DASHBOARD = configs_folder() / "grafana" / "wantrain.json"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return what was scraped, by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def named(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    """Return the one value of a name that has these labels among others."""
    (value,) = [v for (n, have), v in found.items() if n == name and frozenset(labels.items()) <= have]
    return value


def test_a_running_jobs_endpoints_say_what_its_run_directory_says(watched: Watched) -> None:
    workers = Plan.load(watched.run.plan).workers
    first, second = (samples(text) for text in watched.scraped)
    records = watched.run.read_steps(0)
    at = round(named(first, "wantrain_step", run="run", worker=workers[0]))
    done = records[: at + 1]
    assert at >= 10
    assert named(first, "wantrain_loss") == records[at].loss
    assert named(first, "wantrain_tokens_total") == sum(one.tokens for one in done)
    sent = named(first, "wantrain_sent_bytes_total", worker=workers[0], peer=workers[1])
    assert sent == sum(one.sent[workers[1]].wire_bytes for one in done)
    assert named(first, "wantrain_held_out_loss") in [one.validation_loss for one in watched.run.read_validations()]
    waited = sum(one.waited_s.get(workers[1], 0.0) for one in done)
    assert named(first, "wantrain_wait_seconds_total", peer=workers[1]) == pytest.approx(waited)
    assert named(second, "wantrain_sent_bytes_total", worker=workers[1], peer=workers[0]) > 0
    assert not [name for name, _ in second if name in ("wantrain_loss", "wantrain_tokens_total")]


def test_an_endpoint_is_gone_once_its_run_has_ended(watched: Watched) -> None:
    assert list((watched.run.path / "prometheus").iterdir()) == []


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        loss=3.0 - step,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=256,
        step_s=0.5,
        compute_s=0.25,
        waited_s={"w-1": 0.125},
        sent={"w-1": LinkTraffic(raw_bytes=400, wire_bytes=100, busy_s=0.0625)},
        finished_at=1.7e9 + step,
        codecs={"w-1/forward": CodecLoss(relative_error=0.1, clipped_share=0.0, bits=4)},
    )


def test_counters_grow_and_gauges_are_the_last_steps(tmp_path: Path) -> None:
    sink = Prometheus(port=0)
    sink.begin(RunFacts("demo", 0, small_plan(2, 1), folder=tmp_path))
    try:
        (target,) = json.loads((tmp_path / "prometheus" / "rank-0.json").read_text())[0]["targets"]
        assert target == f"127.0.0.1:{sink.port}"
        assert samples(fetch(f"http://{target}/metrics")) == {}
        for step in range(2):
            sink.step(record(step))
        sink.validation(ValidationRecord(step=1, validation_loss=2.5))
        found = samples(fetch(f"http://{target}/metrics"))
        with pytest.raises(ConfigError, match=r"can't serve metrics on 127.0.0.1:\d+ \(address already in use\)"):
            Prometheus(port=sink.port).begin(RunFacts("demo", 0, small_plan(2, 1)))
    finally:
        sink.close()
    assert named(found, "wantrain_loss", run="demo", worker="w-0") == 2.0
    assert named(found, "wantrain_held_out_loss") == 2.5
    assert named(found, "wantrain_sent_bytes_total", peer="w-1") == 200
    assert named(found, "wantrain_link_busy_seconds_total", peer="w-1") == 0.125
    assert named(found, "wantrain_codec_bits", peer="w-1", way="forward") == 4


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"needs the package prometheus_client \(not installed\)"):
        Prometheus()


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def expressions() -> list[str]:
    """Return every PromQL expression of the dashboard, with Grafana's variables filled in."""
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [one.replace("$__rate_interval", "20s").replace("$run", ".*").replace("$worker", ".*") for one in asked]


def variables() -> list[tuple[str, str]]:
    """Return what the dashboard's variables list: a series and one of its labels."""
    found = [
        re.fullmatch(r"label_values\((.+), (\w+)\)", one["query"]["query"]) for one in dashboard()["templating"]["list"]
    ]
    return [(match[1].replace("$run", ".*"), match[2]) for match in found if match]


def test_the_dashboard_is_what_grafana_knows() -> None:
    """Read with Grafana Labs' own types and written again it has lost nothing but what belongs to an exported file."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    board = dashboard()
    back = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    assert set(lost(board, back)) == {"/__inputs", "/__requires", "/id", "/templating/list/*/definition"}


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield where `kept` differs from `given`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for one, other in zip(given, kept, strict=True):
            yield from lost(one, other, f"{path}/*")
    elif given != kept or given is None:
        yield path


def test_the_dashboards_panels_fill_a_page_without_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) == 24 * (1 + max(y for _, y in cells))


@pytest.fixture
def scraped_job(tmp_path: Path) -> Iterator[tuple[WatchedRun, str]]:
    """A real job, and a real Prometheus beside it that finds the workers in the run directory; its API's address."""
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus here; apt-get install prometheus")
    job = WatchedRun(tmp_path, codec="quantized:8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "prometheus.yml"
    found_in = {"files": [f"{job.run.path}/prometheus/*.json"], "refresh_interval": "1s"}
    scrapes = {"job_name": "wantrain", "scrape_interval": "500ms", "file_sd_configs": [found_in]}
    config.write_text(json.dumps({"scrape_configs": [scrapes]}))  # YAML takes JSON
    argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen([*argv, f"--web.listen-address={place}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield job, f"http://{place}/api/v1"
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        job.kill()


def ask(api: str, what: str, **query: str) -> list[Any]:
    """Ask Prometheus; an answer that isn't there yet, or a server that isn't, is an empty one."""
    try:
        answer = json.loads(fetch(f"{api}/{what}?{urllib.parse.urlencode(query)}"))
    except urllib.error.HTTPError as caught:
        if caught.code == 503:  # it is still starting
            return []
        raise AssertionError(f"{query}: {caught.read().decode()}") from None
    except urllib.error.URLError:
        return []
    assert answer["status"] == "success"
    found: list[Any] = answer["data"]["result"] if what == "query" else answer["data"]
    return found


def wait_for_answer(job: WatchedRun, api: str, what: str, **query: str) -> list[Any]:
    """Return Prometheus' answer, once there is one with figures in it (NaN is nothing to look at)."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := ask(api, what, **query)) or any(
        series["value"][1] == "NaN" for series in found if what == "query"
    ):
        assert time.monotonic() < deadline_s, f"no answer to {query}"
        job.raise_if_ended()
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_a_real_prometheus_scrapes_a_real_run_and_answers_all_that_the_dashboard_asks(
    scraped_job: tuple[WatchedRun, str],
) -> None:
    job, api = scraped_job
    job.wait_for_step(6)
    wait_for_answer(job, api, "query", query="count(wantrain_step) == 2")
    for one in expressions():
        wait_for_answer(job, api, "query", query=one)
    for series, label in variables():
        found = wait_for_answer(job, api, f"label/{label}/values", **{"match[]": series})
        assert found == (["run"] if label == "run" else sorted(Plan.load(job.run.plan).workers))
    first, second = Plan.load(job.run.plan).workers
    (loss,) = wait_for_answer(job, api, "query", query="wantrain_loss")
    link = f'wantrain_sent_bytes_total{{worker="{first}", peer="{second}"}}'
    (sent,) = wait_for_answer(job, api, "query", query=link)
    exposed = {name for name, _ in samples(fetch(f"http://{job.wait_for_endpoints()[0]}/metrics"))}
    assert {name for one in expressions() for name in re.findall(r"wantrain_\w+", one)} <= exposed
    assert job.stop() == 130, job.said
    records = job.steps()
    assert float(loss["value"][1]) in [one.loss for one in records]
    totals = [sum(one.sent[second].wire_bytes for one in records[: i + 1]) for i in range(len(records))]
    assert float(sent["value"][1]) in totals
