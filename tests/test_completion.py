"""The completion scripts, asked by the real shells; what each offers is what the parser and the shipped files say."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wantrain import cli
from wantrain.config import RunConfig
from wantrain.resources import shipped
from wantrain.run_file import key_names

ASK_BASH = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
compopt() { :; }
_wantrain
printf '%s\\n' "${COMPREPLY[@]}"
"""

NOTHING_HEAVY = """
import sys
from wantrain.cli import main
main(["completion", "bash"])
heavy = {"torch", "numpy", "pydantic", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""

TIMEOUT_S = 60.0
COMMANDS = {one.name for one in cli.SUBCOMMANDS}


def need(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed; .ci/run installs it")
    return found


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Path:
    """Write a shell's script; the shell is the parameter."""
    assert cli.main(["completion", request.param]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def ask_bash(script: Path, *words: str) -> set[str]:
    argv = [need("bash"), "--norc", "-c", ASK_BASH, "bash", str(script), "wantrain", *words]
    done = subprocess.run(argv, cwd=script.parent, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stderr == ""
    return set(done.stdout.split())


def ask_fish(script: Path, line: str) -> set[str]:
    argv = [need("fish"), "--no-config", "-c", f"source {script}; complete -C '{line}'"]
    env = os.environ | {"HOME": str(script.parent), "XDG_CONFIG_HOME": str(script.parent)}
    done = subprocess.run(argv, cwd=script.parent, env=env, capture_output=True, text=True, check=True)
    return {line.partition("\t")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_commands_options_and_values(script: Path) -> None:
    (script.parent / "own.toml").touch()
    assert ask_bash(script, "") >= COMMANDS
    assert ask_bash(script, "pl") == {"plan"}
    assert {"--topology", "--set", "--help"} <= ask_bash(script, "plan", "--")
    assert "--inside" not in ask_bash(script, "launch", "--")
    assert ask_bash(script, "plan", "demo", "--topology", "w") == {"worldwide"}
    assert ask_bash(script, "plan", "demo", "--codec", "") == set()
    assert {*shipped("runs"), "own.toml"} <= ask_bash(script, "launch", "")
    assert ask_bash(script, "init", "--preset", "demo-") == {"demo-short"}
    assert ask_bash(script, "completion", "") == {"bash", "zsh", "fish"}
    assert ask_bash(script, "emulate", "lan", "--", "own") == {"own.toml"}


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_the_run_files_keys(script: Path) -> None:
    assert ask_bash(script, "train", "demo", "--set", "training.validat") == {
        "training.validate_every=",
        "training.validation_samples=",
    }
    assert {f"{key}=" for key in key_names()} == ask_bash(script, "plan", "demo", "--set", "")


@pytest.mark.parametrize("script", ["fish"], indirect=True)
def test_fish_completes_commands_options_and_values(script: Path) -> None:
    assert ask_fish(script, "wantrain ") >= COMMANDS
    assert {"--topology", "--set"} <= ask_fish(script, "wantrain plan --")
    assert ask_fish(script, "wantrain plan demo --topology worldw") == {"worldwide"}
    assert "training.validate_every=" in ask_fish(script, "wantrain train demo --set training.val")
    assert ask_fish(script, "wantrain init --preset demo-") == {"demo-short"}


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("wantrain pl", "wantrain plan "),
        ("wantrain plan demo --topol", "wantrain plan demo --topology "),
        ("wantrain plan demo --topology worldw", "wantrain plan demo --topology worldwide "),
        ("wantrain init --preset demo-", "wantrain init --preset demo-short "),
        ("wantrain train demo --set training.validate_", "wantrain train demo --set training.validate_every="),
        ("wantrain emulate regi", "wantrain emulate regions_us "),
    ],
)
def test_zsh_completes_what_is_typed(script: Path, typed: str, completed: str) -> None:
    """A real zsh at a terminal: what it has written to its line after a Tab is put into a file by a key of its own."""
    shell, said = need("zsh"), script.parent / "said"
    (script.parent / ".zshrc").write_text(
        f"autoload -Uz compinit; compinit -u -D; source {script}; PS1='ready> '\n"
        f"say() {{ print -r -- $BUFFER > {said}.new; mv {said}.new {said}; }}; zle -N say; bindkey '^X' say\n",
        encoding="utf-8",
    )
    terminal, its_end = pty.openpty()
    env = os.environ | {"ZDOTDIR": str(script.parent), "TERM": "dumb"}
    ends = {"stdin": its_end, "stdout": its_end, "stderr": its_end}
    child = subprocess.Popen([shell, "-i"], env=env, start_new_session=True, **ends)
    os.close(its_end)
    try:
        read_until(terminal, b"ready> ")
        os.write(terminal, f"{typed}\t\x18".encode())
        deadline = time.monotonic() + TIMEOUT_S
        while not said.exists() and time.monotonic() < deadline:
            drain(terminal, 0.05)
        assert said.read_text(encoding="utf-8") == f"{completed}\n"
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def drain(terminal: int, within_s: float) -> bytes:
    return os.read(terminal, 4096) if select.select([terminal], [], [], within_s)[0] else b""


def read_until(terminal: int, wanted: bytes) -> None:
    seen, deadline = b"", time.monotonic() + TIMEOUT_S
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        seen += drain(terminal, 1.0)


def test_the_script_is_made_without_loading_anything_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", NOTHING_HEAVY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_keys_are_the_run_files_own() -> None:
    assert {key.partition(".")[0] for key in key_names()} == set(RunConfig.model_fields)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["completion", "tcsh"])
    assert ended.value.code == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
