"""`wantrain init` writes a commented run file; `wantrain config` prints one with every default spelled out."""

from __future__ import annotations

import argparse
import itertools
import shlex
from pathlib import Path

from wantrain.errors import ConfigError
from wantrain.fact import read_text, write_text
from wantrain.resources import find_config, program
from wantrain.run_file import commented, resolved
from wantrain.training.job import load_config


def init(args: argparse.Namespace) -> int:
    """Carry out `wantrain init`."""
    path = Path(args.file)
    if path.suffix != ".toml":
        raise ConfigError(f"a run file is TOML (got '{args.file}'); call it '{path.with_suffix('.toml')}'")
    if path.exists():
        raise ConfigError(f"{path} is there already; give another name, or move it away")
    write_text(path, new_run_file(args.preset, path.stem))
    quoted = shlex.quote(str(path))
    print(f"wrote {path}, from '{args.preset}'; next: {program()} plan {quoted}, {program()} launch {quoted}")
    return 0


def new_run_file(preset: str, name: str) -> str:
    """Return a run file with a preset's values and a comment for every key.

    What the preset leaves at its default is commented out; the model's shape is in the file itself.
    """
    source = find_config("runs", preset, ConfigError)
    config = load_config(preset).model_copy(update={"name": name})
    text = read_text(source, ConfigError)
    said = [line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, text.splitlines())]
    head = [
        *(f"A run file, begun from '{source.stem}':", *said, ""),
        *("Keys behind a '#' have their default values; the text \"null\" stands for null.",),
    ]
    return commented(config.model_dump(), config.model_dump(exclude_unset=True), head)


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def show(args: argparse.Namespace) -> int:
    """Carry out `wantrain config`."""
    config = load_config(args.config, overrides=args.set)
    print(config.model_dump_json(indent=1) if args.json else resolved(config.model_dump()).rstrip("\n"))
    return 0
