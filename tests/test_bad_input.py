"""Bad input gets one line on standard error, exit status 2 and no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wantrain import cli

ROOT = Path(__file__).resolve().parent.parent
RUN_FILE = (ROOT / "configs/runs/demo-short.toml").read_text(encoding="utf-8")
TOPOLOGY = (ROOT / "configs/topologies/two_sites.toml").read_text(encoding="utf-8")

TINY = """
name = "tiny"
[model]
num_layers = 1
hidden = 16
num_heads = 2
seq_len = 16
[training]
steps = 6
batch_size = 2
[checkpoint]
every = 2
"""
"""A job of one process, over in a moment."""


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run the command line in an empty folder and return the one line with which it refuses its input.

    It runs in this process: an error that is not turned into a line would come up here.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        try:
            status: object = cli.main(arguments)
        except SystemExit as ended:
            status = ended.code
        return the_line(status, capsys.readouterr().err)

    return run


def the_line(status: object, said: str) -> str:
    """Check that a command ended with status 2 and one line, and return that."""
    assert status == 2, said
    assert said.startswith("wantrain: ")
    assert said.count("\n") == 1, said
    return said.removeprefix("wantrain: ")


def as_process(rank: int, world_size: int, port: int = 29500) -> dict[str, str]:
    """Return what torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("num_lanes =", "num_lane ="), "run.toml: unknown key 'training.num_lane' (did you mean 'num_lanes'?)"),
        (("steps = 12", 'steps = "many"'), "training.steps: input should be a valid integer"),
        (("steps = 12", "steps = -1"), "training.steps: input should be greater than or equal to 1 (got -1)"),
        (("[training]", "[training"), "run.toml is not TOML"),
        (("[model]", '[model]\nfile = "none.toml"'), "can't read none.toml (No such file or directory)"),
        (("num_replicas = 2", "num_replicas = 3"), "need 6 workers (4 may take part)"),
        (("num_lanes = 4", "num_lanes = 3"), "batch_size must be a multiple of num_lanes (got 16 and 3)"),
        (('topology = "two_sites"', 'topology = "two_site"'), "no 'two_site' among the topologies (did you mean"),
        (
            ('"two_sites"\nnum_stages = 2\nnum_replicas = 2', '"worldwide"\nnum_stages = 8'),
            "8 stages need as many layers (the model has 6); lower num_stages",
        ),
    ],
)
def test_a_wrong_run_file_is_refused(change: tuple[str, str], said: str, refusal: Refusal) -> None:
    text = RUN_FILE.replace(*change)
    assert text != RUN_FILE
    Path("run.toml").write_text(text, encoding="utf-8")
    assert said in refusal("plan", "run.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ('"100 Mbit/s"', '"-100 Mbit/s"'),
            "link.2.bandwidth: rate must not be negative or infinite (got '-100 Mbit/s')",
        ),
        (('"100 Mbit/s"', "100"), "link.2.bandwidth: rate needs a unit (got 100, expected text like '5 Mbit/s')"),
        (('"100 Mbit/s"', '"100"'), "link.2.bandwidth: rate has no unit (got '100'"),
        (('between = ["east", "west"]', 'from = "east"\nto = "west"'), "no link from 'b-0' to 'a-0' and 3 more pairs"),
        (('count = 2\nsite = "west"', 'site = "west"'), "need 4 workers (3 may take part)"),
    ],
)
def test_a_wrong_topology_is_refused(change: tuple[str, str], said: str, refusal: Refusal) -> None:
    Path("own.toml").write_text(TOPOLOGY.replace(*change), encoding="utf-8")
    assert said in refusal("plan", "demo-short", "--topology", "own.toml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "demo-short", "--ouut", "x"], "unrecognized arguments: --ouut x"),
        (["plan", "nowhere.toml"], "can't find nowhere.toml; give the path of a TOML file, or one of aqsgd-gpt2-xl, "),
        (["plan", "dem"], "there is no 'dem' among the runs (did you mean 'demo'?)"),
        (["plan", "demo-short", "--out", "/proc/none/plan.json"], "can't write /proc/none/plan.json"),
        (["generate", "nowhere"], "no checkpoint in nowhere; give a run directory or a step-… folder"),
        (["report", "nowhere"], "no run directory at nowhere"),
        (["train", "demo-short", "--worker", "c-0"], "the plan has no worker 'c-0' (it has "),
        (["launch", "demo-short", "--no-emulation", "--run-dir", "none", "--resume"], "nothing to resume in none"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], said: str, refusal: Refusal) -> None:
    assert said in refusal(*arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "data 'text' doesn't exist (expected \"stdlib\", a file or a folder)"),
        ("", "data 'text' holds no text"),
        ("a short text\n", "is shorter than a sample (got "),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(text: str | None, said: str, refusal: Refusal) -> None:
    if text is not None:
        Path("text").write_text(text, encoding="utf-8")
    assert said in refusal("launch", "demo-short", "--no-emulation", "--data", "text")


def train_refusal(folder: Path, process: dict[str, str]) -> str:
    """Return the line with which a worker refuses; it ends its whole process, so it gets one of its own."""
    argv = [sys.executable, "-m", "wantrain", "train", "demo-short"]
    done = subprocess.run(argv, cwd=folder, env=environment(**process), capture_output=True, text=True, check=False)
    return the_line(done.returncode, done.stderr)


def test_a_worker_that_nobody_started_as_one_is_refused(tmp_path: Path) -> None:
    assert "the environment lacks MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE" in train_refusal(tmp_path, {})


def test_a_world_size_that_is_not_the_plans_is_refused(tmp_path: Path) -> None:
    assert "the plan is for 4 processes (got 3)" in train_refusal(tmp_path, as_process(0, 3))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with taken_port() as port:
        said = train_refusal(tmp_path, as_process(0, 4, port))
    assert f"port taken (127.0.0.1:{port}); choose another MASTER_PORT" in said


def in_namespace(preparation: str, command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a user and mount namespace that shell code has prepared; skip where there can be none."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("private namespaces are forbidden here")
    argv = ["unshare", "-Urm", "sh", "-ec", f'{preparation}; exec "$@"', "sh", *command]
    return subprocess.run(argv, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False)


def test_forbidden_namespaces_are_named_and_no_emulation_is_offered(tmp_path: Path) -> None:
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces"
    command = ["setpriv", "--bounding-set=-all", sys.executable, "-m", "wantrain", "launch", "demo-short"]
    done = in_namespace(forbid, command, tmp_path)
    said = the_line(done.returncode, done.stderr)
    assert "private network namespaces are forbidden here (user.max_user_namespaces is 0)" in said
    assert "--no-emulation" in said


def test_a_full_disk_while_saving_is_named_and_the_run_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    """A checkpoint of the tiny model takes about 100 kB: two fit on the disk beside the metrics, the third does not."""
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    (tmp_path / "text").write_text("some text to train on, over and over\n" * 500, encoding="utf-8")
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    train = [sys.executable, "-m", "wantrain", "train", "tiny.toml", "--data", "text", "--run-dir"]
    env = as_process(0, 1, free_port()) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    rescued = tmp_path / "rescued"
    fill = f"mount -t tmpfs -o size=260k none {small_disk}"
    keep = f'"$@" && status=0 || status=$?; cp -r {small_disk}/run {rescued}; exit $status'
    done = in_namespace(fill, ["sh", "-c", keep, "sh", *train, str(small_disk / "run")], tmp_path, **env)
    assert "No space left on device); free some space" in the_line(done.returncode, done.stderr)
    resumed = subprocess.run(
        [*train, str(rescued), "--resume"],
        cwd=tmp_path,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step " in resumed.stderr
