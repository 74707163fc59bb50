"""The command line's skeleton: fast, one line for a mistake, the error's own exit status."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wantrain import cli
from wantrain.errors import ChannelError, EmulationError

NOTHING_HEAVY = """
import sys
from wantrain.cli import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "pydantic", "rich", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], *([one.name, "--help"] for one in cli.SUBCOMMANDS)])
def test_help_imports_nothing_heavy_and_answers_at_once(arguments: list[str]) -> None:
    began = time.monotonic()
    code = NOTHING_HEAVY.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: wantrain" in done.stdout
    assert time.monotonic() - began < 2.0  # the aim is 0.5 s; a crowded machine takes longer


@pytest.mark.parametrize("one", cli.SUBCOMMANDS, ids=lambda one: str(one.name))
def test_every_handler_exists(one: cli.Subcommand) -> None:
    module, _, function = one.handler.partition(":")
    source = Path(cli.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    defined = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in defined


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["emulat"], "wantrain: unknown command 'emulat' (did you mean 'emulate'?); see 'wantrain --help'\n"),
        (["emulate"], "wantrain: the following arguments are required: TOPOLOGY; see 'wantrain emulate --help'\n"),
        (
            ["--version", "--", "ls"],
            "wantrain: no command is taken here (got 'ls' after '--'); see 'wantrain --help'\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("text", ["0.5", "nan", "inf", "x"])
def test_a_dilation_below_one_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["emulate", "lan", "--dilation", text])
    assert f"dilation must be a number, at least 1 (got '{text}')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status"),
    [(EmulationError("no; do x"), 2), (ChannelError("gone; wait"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_exit_status_is_the_errors_own(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object, __: object) -> int:
        raise raised

    monkeypatch.setattr(cli.Subcommand, "run", fail)
    assert cli.main(["emulate", "lan", "--check"]) == status
    said = capsys.readouterr().err
    assert said == ("" if status == 130 else f"wantrain: {raised}\n")


def test_what_follows_two_dashes_is_the_command() -> None:
    _, args = cli.parse(["emulate", "lan", "--check", "--", "ls", "--", "-l"])
    assert args.command == ["ls", "--", "-l"]
    assert args.argv == ["emulate", "lan", "--check", "--", "ls", "--", "-l"]


@pytest.mark.alone
@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_help_takes_half_a_second_at_most(arguments: list[str]) -> None:
    """The best of several: what else the machine does only ever adds."""

    def seconds() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "wantrain", *arguments], stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - began

    assert min(seconds() for _ in range(5)) < 0.5
