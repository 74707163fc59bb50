"""`--set training.steps=100`: one value of a run file, said on the command line.

What stands behind "=" is read as its key's own type asks: text as it is, with or without quotes; null where a key may
be null; a list with or without its brackets; a whole table as TOML writes it on one line, { every = 5, keep = 2 }.
TOML itself has no null: in a run file the text "null" stands for it, where a key may be null.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from wantrain.errors import ConfigError, did_you_mean
from wantrain.fact import Fact

NULL = "null"


def with_overrides(cls: type[Fact], data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a fact's data with some values replaced; raise ConfigError for keys that the fact doesn't have."""
    changed = dict(data)
    for override in overrides:
        path, value = split_override(override)
        changed = _replaced(changed, (cls,), path, value, ())
    return changed


def split_override(override: str) -> tuple[tuple[str, ...], str]:
    """Return key and value of KEY=VALUE; raise ConfigError where it is neither."""
    key, equals, value = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set takes KEY=VALUE (got {override!r}); for example training.steps=100")
    return path, value.strip()


def _replaced(
    data: Mapping[str, Any], tables: Sequence[type[Fact]], path: Sequence[str], text: str, above: tuple[str, ...]
) -> dict[str, Any]:
    name, *rest = path
    place = (*above, name)
    annotations = [cls.model_fields[name].annotation for cls in tables if name in cls.model_fields]
    if not annotations:
        hint = did_you_mean(name, {known for cls in tables for known in cls.model_fields})
        raise ConfigError(f"--set: unknown key '{'.'.join(place)}'{hint}; 'wantrain init' writes a file with all keys")
    kinds = [kind for annotation in annotations for kind in kinds_of(annotation)]
    if not rest:
        return {**data, name: _read(kinds, text)}
    inner = [kind for kind in kinds if issubclass(kind, Fact)]
    if not inner:
        raise ConfigError(f"--set: '{'.'.join(place)}' is a value and has no keys of its own (got '{'.'.join(rest)}')")
    table = data.get(name)
    return {**data, name: _replaced(table if isinstance(table, Mapping) else {}, inner, rest, text, place)}


def kinds_of(annotation: Any) -> Iterator[type]:
    """Yield the plain types that a key's annotation allows: of a union each, of a choice its values' own."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from kinds_of(inner[0])
    elif origin in (Union, UnionType):
        for one in inner:
            yield from kinds_of(one)
    elif origin is Literal:
        yield from {type(value) for value in inner}
    else:
        kind = NoneType if annotation is None else origin or annotation
        yield kind if isinstance(kind, type) else object


def _read(kinds: Sequence[type], text: str) -> Any:
    """Return what `text` says for a key of these types; what it can't be stays text, for the fact to refuse."""
    if text == NULL and NoneType in kinds:
        return None
    is_table = text.startswith("{") and any(issubclass(kind, Mapping | Fact) for kind in kinds)
    if str in kinds and not is_table:
        return _toml(text) if text[:1] in ("'", '"') else text
    if tuple in kinds or list in kinds:
        bare = text.removeprefix("[").removesuffix("]")
        value = _toml(f"[{bare}]")
        return [part.strip() for part in bare.split(",")] if isinstance(value, str) else value
    return _toml(text)


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def with_nulls(cls: type[Fact], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a TOML file's data with the text "null" read as null where a key may be null."""
    read = dict(data)
    for name, value in data.items():
        kinds = list(kinds_of(cls.model_fields[name].annotation)) if name in cls.model_fields else []
        if value == NULL and NoneType in kinds:
            read[name] = None
        elif isinstance(value, Mapping):
            for inner in (kind for kind in kinds if issubclass(kind, Fact)):
                read[name] = with_nulls(inner, read[name])
    return read
