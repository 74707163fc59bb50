"""`wantrain completion SHELL`: what bash, zsh or fish need to complete wantrain's command line.

The scripts are made from the parser's own tree, the shipped files' names and the run file's keys, and then answer by
themselves: nothing of wantrain runs while somebody types.

    eval "$(wantrain completion bash)"       in ~/.bashrc
    eval "$(wantrain completion zsh)"        in ~/.zshrc, after compinit
    wantrain completion fish | source        in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from wantrain.benching import BENCHMARKS
from wantrain.cli import build_parser
from wantrain.resources import shipped
from wantrain.run_file import key_names

_FOLDERS = ("DIR", "RUN", "CHECKPOINT")
_FILES = ("FILE", "PATH", "PLAN", "F", "CONFIG", "T", "TOPOLOGY", "M", "HOSTS")
_SHIPPED = {"CONFIG": "runs", "T": "topologies", "TOPOLOGY": "topologies", "M": "models"}
_KEY = "KEY=VALUE"


class Values(NamedTuple):
    """What may stand in one place: words, and paths ("files", "folders" or ""); `is_open`: a word is to go on."""

    words: tuple[str, ...] = ()
    paths: str = ""
    is_open: bool = False


class Option(NamedTuple):
    """An option of a subcommand; `values` is None for one that takes none."""

    flags: tuple[str, ...]
    summary: str
    values: Values | None
    is_repeatable: bool


class Command(NamedTuple):
    """A subcommand with its options, and what stands in its line beside them."""

    name: str
    summary: str
    options: tuple[Option, ...]
    operands: Values | None


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain completion`."""
    make = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[args.shell]
    print("\n".join(make(command_tree(build_parser()))))
    return 0


def command_tree(parser: argparse.ArgumentParser) -> list[Command]:
    """Return the subcommands of a parser."""
    (choice,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    summaries = {one.dest: one.help or "" for one in choice._choices_actions}
    return [_command(name, summaries[name], inner) for name, inner in choice.choices.items()]


def _command(name: str, summary: str, parser: argparse.ArgumentParser) -> Command:
    shown = [one for one in parser._actions if one.help != argparse.SUPPRESS]
    operands = [_values(one) for one in shown if not one.option_strings and one.nargs != argparse.REMAINDER]
    options = (
        Option(
            tuple(one.option_strings),
            (one.help or "").replace("%(default)s", str(one.default)),
            None if one.nargs == 0 else _values(one),
            isinstance(one, argparse._AppendAction),
        )
        for one in shown
        if one.option_strings
    )
    return Command(name, summary, tuple(options), operands[0] if operands else None)


def _values(action: argparse.Action) -> Values:
    metavar = str(action.metavar or "")
    if action.choices is not None:
        return Values(tuple(map(str, action.choices)))
    if action.dest in ("preset", "question"):
        return Values(tuple(shipped("runs") if action.dest == "preset" else BENCHMARKS))
    if metavar == _KEY:
        return Values(tuple(f"{key}=" for key in key_names()), is_open=True)
    names = tuple(shipped(_SHIPPED[metavar])) if metavar in _SHIPPED else ()
    return Values(names, "folders" if metavar in _FOLDERS else "files" if metavar in _FILES else "")


def bash_script(commands: Iterable[Command]) -> Iterator[str]:
    """Yield the lines of a script for bash."""
    commands = list(commands)
    yield from (
        "_wantrain_reply() {  # WORDS [f or d: files or folders too]",
        '  mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur"; [[ -z $2 ]] || compgen "-$2" -- "$cur")',
        "  [[ -z $2 ]] || compopt -o filenames",
        "}",
        "_wantrain() {",
        "  local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[1]}",
        "  COMPREPLY=()",
        "  ((COMP_CWORD > 1)) || command=",
        '  if [[ " ${COMP_WORDS[*]:0:COMP_CWORD} " == *" -- "* ]]; then _wantrain_reply "" f; return; fi',
        '  case "$command $before" in',
    )
    for command in commands:
        for option in command.options:
            if option.values is not None:
                patterns = " | ".join(f"'{command.name} {flag}'" for flag in option.flags)
                yield f"    {patterns}) {_bash_reply(option.values)}; return ;;"
    yield from ("  esac", '  case "$command $cur" in')
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        yield f"    '{command.name} -'*) _wantrain_reply '{flags}' ;;"
        yield f"    '{command.name} '*) {_bash_reply(command.operands or Values())} ;;"
    yield f"    ' '*) _wantrain_reply '{' '.join(command.name for command in commands)} --help --version' ;;"
    yield from ("  esac", "}", "complete -F _wantrain wantrain")


def _bash_reply(values: Values) -> str:
    kind = {"files": " f", "folders": " d", "": ""}[values.paths]
    return f"_wantrain_reply '{' '.join(values.words)}'{kind}" + ("; compopt -o nospace" if values.is_open else "")


def zsh_script(commands: Iterable[Command]) -> Iterator[str]:
    """Yield the lines of a script for zsh; it goes as a function's file as well."""
    commands = list(commands)
    yield from ("#compdef wantrain", "_wantrain() {", "  local curcontext=$curcontext context state line")
    yield "  if ((CURRENT == 2)); then"
    yield "    local -a commands=("
    yield from (f"      {shlex.quote(f'{command.name}:{command.summary}')}" for command in commands)
    yield from ("    )", "    _describe command commands", "    return", "  fi")
    yield from ("  local command=$words[2]", "  shift words", "  ((CURRENT--))", "  case $command in")
    for command in commands:
        specs = [spec for option in command.options for spec in _zsh_specs(option)]
        specs += [] if command.operands is None else [f"*:operand:{_zsh_action(command.operands)}"]
        yield f"    {command.name}) _arguments -s {' '.join(shlex.quote(spec) for spec in specs)} ;;"
    yield from ("  esac", "}")
    yield "if [[ $funcstack[1] == _wantrain ]]; then _wantrain; else compdef _wantrain wantrain; fi"


def _zsh_specs(option: Option) -> Iterator[str]:
    summary = option.summary.translate({ord(sign): f"\\{sign}" for sign in "[]:\\"})
    tail = "" if option.values is None else f":value:{_zsh_action(option.values)}"
    for flag in option.flags:
        yield f"{'*' if option.is_repeatable else ''}{flag}[{summary}]{tail}"


def _zsh_action(values: Values) -> str:
    option = "-S '' " if values.is_open else ""
    parts = [f"compadd {option}-- {' '.join(values.words)}"] if values.words else []
    parts += {"files": ["_files"], "folders": ["_files -/"], "": []}[values.paths]
    return f"{{{'; '.join(parts)}}}" if parts else " "


def fish_script(commands: Iterable[Command]) -> Iterator[str]:
    """Yield the lines of a script for fish."""
    yield "complete -c wantrain -e"
    yield "complete -c wantrain -f"
    for command in commands:
        name, where = command.name, f"complete -c wantrain -n '__fish_seen_subcommand_from {command.name}'"
        yield f"complete -c wantrain -n __fish_use_subcommand -a {name} -d {_fish_quote(command.summary)}"
        for option in command.options:
            flags = " ".join(f"-{'l' if flag.startswith('--') else 's'} {flag.lstrip('-')}" for flag in option.flags)
            values = "" if option.values is None else f" -r{_fish_values(option.values)}"
            yield f"{where} {flags}{values} -d {_fish_quote(option.summary)}"
        if command.operands is not None:
            yield f"{where}{_fish_values(command.operands)}"


def _fish_values(values: Values) -> str:
    words = " ".join(values.words)
    folders = " (__fish_complete_directories)" if values.paths == "folders" else ""
    arguments = f" -a {_fish_quote((words + folders).strip())}" if words or folders else ""
    return (" -F" if values.paths == "files" else " -f") + arguments


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
