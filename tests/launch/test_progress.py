from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from wantrain.launch.progress import PLAIN_EVERY_S, Progress, Tail
from wantrain.plan import Plan, ReplicaPlan, StagePlan
from wantrain.run_directory import RunDirectory, ValidationRecord

WORKERS = ("paris-0", "tokyo-0")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.metrics(0).parent.mkdir(parents=True)
    return run


@pytest.fixture
def plan() -> Plan:
    return Plan(
        topology="two",
        model="tiny",
        num_layers=2,
        batch_size=2,
        microbatch_size=1,
        num_lanes=2,
        schedule="1f1b",
        stages=(StagePlan(first_layer=0, end_layer=2, max_in_flight=1),),
        replicas=tuple(ReplicaPlan(workers=(name,), num_microbatches=1, lanes=(i,)) for i, name in enumerate(WORKERS)),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain() -> Console:
    return Console(file=io.StringIO(), width=60)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def step_line(rank: int, step: int, finished_at: float) -> str:
    """A step of 2 s whose rank 0 keeps its link busy for 1.42 s, the other for 0.5 s."""
    sent = {WORKERS[1 - rank]: {"raw_bytes": 10, "wire_bytes": 10, "busy_s": 1.42 - 0.92 * rank}}
    rest = {"grad_norm": 1.0, "learning_rate": 0.1, "tokens": 1000, "step_s": 2.0, "compute_s": 1.0, "waited_s": {}}
    return json.dumps({"step": step, "loss": 3.0 - step / 100, "sent": sent, "finished_at": finished_at} | rest) + "\n"


def add_steps(run: RunDirectory, steps: range, first_at: float = 1002.0) -> None:
    for rank in range(2):
        with run.metrics(rank).open("a", encoding="utf-8") as file:
            file.writelines(step_line(rank, step, first_at + 2.5 * i) for i, step in enumerate(steps))


def test_a_tail_gives_each_whole_line_once(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":', encoding="utf-8")
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.read() == []
    with path.open("a", encoding="utf-8") as file:
        file.write(" 3}\n")
    assert tail.read() == [{"a": 3}]
    assert not tail.restarted


@pytest.mark.parametrize("rewritten", ['{"a": 9}\n', '{ "a":  1 }\n{ "a":  8, "longer": true }\n', ""])
def test_a_rewritten_file_is_read_from_its_beginning(tmp_path, rewritten):
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    tail = Tail(path)
    tail.read()
    path.write_text(rewritten, encoding="utf-8")
    assert tail.read() == [json.loads(line) for line in rewritten.splitlines()]
    assert tail.restarted
    tail.read()
    assert not tail.restarted


def test_a_plain_line_tells_everything_every_ten_seconds(run, plan, clock):
    console = plain()
    with Progress(run, plan, num_steps=100, console=console, clock=clock) as progress:
        add_steps(run, range(10))
        with run.metrics(0).open("a", encoding="utf-8") as file:
            file.write(ValidationRecord(step=9, validation_loss=2.5).model_dump_json() + "\n")
        progress.update()
        assert shown(console) == ""
        clock.now += PLAIN_EVERY_S
        progress.update()
        progress.update()
    assert shown(console) == (
        "step 10/100, loss 2.910, held out 2.500, 500 tokens/s, busiest paris-0→tokyo-0 71 %, 3:45 left\n"
    )


def test_before_the_first_step_it_says_that_it_waits(run, plan, clock):
    console = plain()
    with Progress(run, plan, 100, console=console, clock=clock) as progress:
        clock.now += 12
        progress.update()
    assert shown(console) == "waiting for the first step, 12 s so far\n"


def test_the_last_state_is_printed_at_the_end(run, plan, clock):
    console = plain()
    with Progress(run, plan, 10, console=console, clock=clock):
        add_steps(run, range(10))
    assert shown(console).startswith("step 10/10, loss 2.910")
    assert "left" not in shown(console)


def test_a_terminal_gets_a_bar_that_moves(run, plan, clock):
    console = terminal()
    with Progress(run, plan, 20, console=console, clock=clock) as progress:
        assert "step 0/20" in shown(console)
        add_steps(run, range(5))
        progress.update()
        assert "step 5/20" in shown(console)
        assert "25 %, 38 s left" in shown(console)
        assert "━" in shown(console)
        assert "busiest paris-0→tokyo-0 71 %" in shown(console)


def test_a_note_stands_above_the_progress(run, plan, clock):
    console = terminal()
    with Progress(run, plan, 20, console=console, clock=clock) as progress:
        progress.note("stopping after this step")
    assert "stopping after this step" in shown(console)


def test_a_resumed_run_counts_from_where_it_goes_on(run, plan, clock):
    add_steps(run, range(57), first_at=10.0)
    console = plain()
    with Progress(run, plan, 100, first_step=50, console=console, clock=clock) as progress:
        for rank in range(2):
            run.metrics(rank).write_text("".join(step_line(rank, step, 10.0) for step in range(50)), encoding="utf-8")
        progress.update()
        add_steps(run, range(50, 53))
        progress.update()
        assert progress.tokens_per_s == 500
    assert shown(console).startswith("step 53/100, loss 2.480")


def test_steps_from_before_a_resumed_run_set_no_pace(run, plan, clock):
    add_steps(run, range(30), first_at=10.0)
    with Progress(run, plan, 100, console=plain(), clock=clock) as progress:
        progress.update()
        assert progress.left_s is None
        assert progress.tokens_per_s is None
        assert progress.busiest_link is None
        add_steps(run, range(30, 34))
        progress.update()
        assert progress.left_s == pytest.approx(2.5 * 66)


def test_the_cursor_comes_back_when_the_launcher_fails(run, plan, clock):
    console = terminal()
    with pytest.raises(RuntimeError), Progress(run, plan, 20, console=console, clock=clock):
        raise RuntimeError("worker gone")
    assert shown(console).rstrip("\n").endswith("\x1b[?25h")
