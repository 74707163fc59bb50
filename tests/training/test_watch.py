"""No sink can end training, slow it, or change a number of it; what can't be had is refused before it begins."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs import flat_topology, make_trainer, run_ranks, small_plan
from tests.training.test_loop import losses, make_config, plan_of
from wantrain.comm.loopback import LoopbackJob
from wantrain.config import WatchConfig
from wantrain.errors import ConfigError
from wantrain.run_directory import RunDirectory, StepRecord, ValidationRecord
from wantrain.training import watch as watching
from wantrain.training.job import Job
from wantrain.training.loop import train
from wantrain.training.metrics import MetricsSink, RunFacts, RunLines
from wantrain.training.watch import Watch, check_reach, check_sinks, make_sinks

PLAN = small_plan(2, 1)


def record(step: int) -> StepRecord:
    figures = {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 256, "step_s": 0.5, "compute_s": 0.25}
    return StepRecord(step=step, waited_s={}, sent={}, finished_at=1.7e9 + step, **figures)


class Spy:
    """A sink that keeps what it is told, after whatever `then` does with it."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.then = then
        self.facts: RunFacts | None = None
        self.told: list[object] = []
        self.is_closed = False

    def begin(self, facts: RunFacts) -> None:
        self.facts = facts

    def step(self, record: StepRecord) -> None:
        self.then()
        self.told.append(record.step)

    def validation(self, record: ValidationRecord) -> None:
        self.told.append(record.validation_loss)

    def note(self, text: str) -> None:
        self.told.append(text)

    def close(self) -> None:
        self.is_closed = True


def full() -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return RunFacts("run", 1, PLAN, folder=tmp_path)


def test_every_sink_is_told_everything_in_order_and_closed(facts: RunFacts) -> None:
    one, other = Spy(), Spy()
    with Watch(facts, [one, other]) as watch:
        for step in range(100):
            watch.step(record(step))
        watch.validation(ValidationRecord(step=99, validation_loss=2.5))
        watch.note("stopped")
    for spy in (one, other):
        assert spy.told == [*range(100), 2.5, "stopped"]
        assert spy.is_closed
        assert spy.facts == facts


def test_a_sink_that_fails_says_so_once_and_the_others_go_on(
    facts: RunFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = Spy(full), Spy()
    with Watch(facts, [broken, whole], RunLines(tmp_path)) as watch:
        for step in range(5):
            watch.step(record(step))
    said = "w-1: Spy failed ([Errno 28] No space left on device); training goes on without it\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "notes.txt").read_text() == said
    assert whole.told == list(range(5))
    assert broken.is_closed
    assert [one.step for one in RunDirectory(tmp_path).read_steps(1)] == list(range(5))


def test_a_run_directory_that_is_gone_does_not_end_training(
    facts: RunFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Watch(facts, [], RunLines(tmp_path / "run")) as watch:
        watch.step(record(0))
        shutil.rmtree(tmp_path / "run")
        for step in range(1, 4):
            watch.step(record(step))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("w-1: RunLines failed (can't write")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What a sink waits for that stands still: set at the test's end, so that its thread ends too."""
    event = threading.Event()
    yield event
    event.set()


def test_a_sink_that_stands_still_holds_nothing_up_and_loses_records(
    facts: RunFacts, held: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "_BACKLOG", 10)
    monkeypatch.setattr(watching, "_CLOSE_WITHIN_S", 1.0)
    stuck, quick = Spy(lambda: assert_set(held)), Spy()
    with Watch(facts, [stuck, quick]) as watch:
        for step in range(9):
            watch.step(record(step))
        wait_until(lambda: len(quick.told) == 9)
        for step in range(9, 30):
            watch.step(record(step))
            wait_until(lambda step=step: len(quick.told) == step + 1)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "w-1: Spy is 10 records behind; what its queue has no room for is dropped",
        "w-1: Spy did not come to its end in time; its last records may be missing",
    ]
    assert quick.told == list(range(30))
    assert quick.is_closed


def test_what_a_sink_computes_is_not_the_loops_time(facts: RunFacts) -> None:
    def compute() -> None:
        end_s = time.thread_time() + 2e-3
        while time.thread_time() < end_s:
            pass

    slow = Spy(compute)
    with Watch(facts, [slow]) as watch:
        began_s = time.thread_time()
        for step in range(100):
            watch.step(record(step))
        took_s = time.thread_time() - began_s
    assert slow.told == list(range(100))
    assert took_s < 0.1 * 100 * 2e-3  # measured: a hundredth; processor time, which a busy machine hardly changes


def assert_set(event: threading.Event) -> None:
    assert event.wait(600)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another thread does at once."""
    never = threading.Event()
    for _ in range(6000):
        if is_so():
            return
        never.wait(0.01)
    raise AssertionError("it never came")


def test_what_cannot_begin_is_refused_and_what_had_begun_is_closed(facts: RunFacts) -> None:
    class Refused(Spy):
        def begin(self, facts: RunFacts) -> None:
            raise ConfigError("no")

    begun = Spy()
    with pytest.raises(ConfigError, match="no"):
        Watch(facts, [begun, Refused()])
    assert begun.is_closed


def test_training_ends_with_the_same_losses_whatever_its_sinks_do(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(watching, "_CLOSE_WITHIN_S", 0.2)
    config = make_config(tmp_path)
    plan = plan_of(config, 2, 1)

    def run_with(name: str, sinks: Callable[[], list[MetricsSink]]) -> RunDirectory:
        run, job = RunDirectory(tmp_path / name), LoopbackJob(2)

        def body(rank: int) -> None:
            trainer = make_trainer(plan, job.member(rank), rank, model=config.model)
            train(trainer, Job(config, flat_topology(2), plan), run, False, sinks=sinks())
            trainer.close()

        run_ranks(2, body)
        return run

    plain = run_with("plain", list)
    bad = run_with("bad", lambda: [Spy(full), Spy(lambda: assert_set(held))])
    assert losses(bad) == losses(plain)
    assert len(losses(bad)) == 6
    assert capsys.readouterr().err.count("Spy failed") == 2  # once on each rank
    assert bad.notes.read_text().count("Spy failed") == 2


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("prometheus", "prometheus_client")]
)
def test_a_sink_without_its_package_is_refused_in_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WatchConfig.parse({name: {}}, ConfigError, "run.toml")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        check_sinks(config)
    assert str(caught.value) == (
        f"[watch.{name}] needs the package {package} (not installed); run pip install 'wantrain[watch]'"
    )
    check_sinks(WatchConfig())


def test_a_run_file_chooses_sinks_by_tables() -> None:
    tables = {"tensorboard": {"folder": "x"}, "prometheus": {"port": 0}}
    sinks = make_sinks(WatchConfig.parse(tables, ConfigError, "run.toml"))
    assert [type(sink).__name__ for sink in sinks] == ["TensorBoard", "Prometheus"]
    assert make_sinks(WatchConfig()) == []
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        WatchConfig.parse({"tensorbord": {}}, ConfigError, "run.toml")


@pytest.mark.parametrize("tables", [{"prometheus": {}}, {"wandb": {}}])
def test_what_must_be_reached_is_refused_inside_the_emulated_network(tables: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--no-emulation"):
        check_reach(WatchConfig.parse(tables, ConfigError, "run.toml"))
    check_reach(WatchConfig.parse({"wandb": {"mode": "offline"}, "tensorboard": {}}, ConfigError, "run.toml"))
