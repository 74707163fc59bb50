"""The base of every frozen fact: strict about keys, one line per mistake.

A fact refuses unknown keys and names the nearest known one; what it prints is the place in the file, what was got,
and what is expected, in one line, never a page of validation output.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from wantrain.errors import ConfigError, UserError, did_you_mean


class Fact(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Mapping[str, Any], error: type[UserError], source: str) -> Self:
        """Build from plain data; raise `error` with one line that names `source` and the first mistake in it."""
        try:
            return cls.model_validate(data)
        except ValidationError as caught:
            raise error(f"{source}: {_first_line(cls, caught)}") from None


def _first_line(cls: type[BaseModel], caught: ValidationError) -> str:
    mistake = min(caught.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key explains the rest
    place = ".".join(str(part) for part in mistake["loc"] if not _is_tag(part))
    if mistake["type"] == "extra_forbidden":
        return f"unknown key '{place}'{did_you_mean(str(mistake['loc'][-1]), _known_keys(cls, mistake['loc'][:-1]))}"
    if mistake["type"] == "missing":
        return f"missing key '{place}'"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]} (got {mistake['input']!r})"
    return f"{place}: {message}" if place else message


def class_tag(cls: type[BaseModel]) -> str:
    """Return what tells a class among those that a field may have; no key of a file looks like it."""
    return f"<{cls.__name__}>"


def _is_tag(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith("<")


def _known_keys(cls: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the fact at `place` inside `cls` knows."""
    known = [cls]
    for part in place:
        if _is_tag(part):
            known = [one for one in known if class_tag(one) == part]
        elif isinstance(part, str):
            field = next((f for name, f in known[0].model_fields.items() if part in (name, f.alias)), None)
            known = [] if field is None else list(_facts_in(field.annotation))
        if not known:
            return []
    return [field.alias or name for name, field in known[0].model_fields.items()]


def _facts_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the classes that a field's values may have, whatever is around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _facts_in(inner)


def read_text(path: str | Path, error: type[UserError]) -> str:
    """Read a text file; raise `error` with one line where it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as caught:
        reason = caught.strerror if isinstance(caught, OSError) else "not UTF-8 text"
        raise error(f"can't read {path} ({reason}); check the path") from None


def read_toml(path: str | Path, error: type[UserError]) -> dict[str, Any]:
    """Read a TOML file; raise `error` with one line where it is not TOML."""
    try:
        return tomllib.loads(read_text(path, error))
    except tomllib.TOMLDecodeError as caught:
        raise error(f"{path} is not TOML ({caught})") from None


def read_json(path: str | Path, error: type[UserError]) -> dict[str, Any]:
    """Read a JSON object; raise `error` with one line where the file is not one."""
    try:
        data = json.loads(read_text(path, error))
    except json.JSONDecodeError as caught:
        raise error(f"{path} is not JSON ({caught})") from None
    if not isinstance(data, dict):
        raise error(f"{path} is not a JSON object (got {type(data).__name__})")
    return data


def write_text(path: str | Path, text: str) -> None:
    """Replace a file at once: write aside, flush to disk, rename; raise ConfigError where it can't be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as caught:
        raise unwritable(path, caught) from None


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; raise ConfigError where it can't be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as caught:
        raise unwritable(path, caught) from None


def unwritable(path: Path, caught: OSError) -> ConfigError:
    """Return the error for a file that could not be written, with the remedy."""
    remedy = "free some space" if caught.errno == errno.ENOSPC else "choose another place"
    return ConfigError(f"can't write {path} ({(caught.strerror or 'unknown error').lower()}); {remedy}")
