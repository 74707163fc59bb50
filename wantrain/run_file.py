"""A run file as text: every key, what its docstring says of it, and its value.

The keys and their docstrings are read from the source of `wantrain/config.py` itself, so that what is written here is
what the fields say; reading it needs nothing but the standard library, which is what shell completion asks for.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = Path(__file__).resolve().parent
_WIDTH = 116
"""Chosen: as wide as the code, with "# " before it."""


class Key(NamedTuple):
    """A key of a run file; `keys` are those below it, where it is a table, and `doc` is then the table's own."""

    name: str
    doc: str
    keys: tuple[Key, ...]


def run_file_keys() -> tuple[Key, ...]:
    """Return the keys of a run file, in the order in which they are written."""
    return tuple(sorted(_keys_of("config", "RunConfig"), key=lambda key: bool(key.keys)))  # TOML: tables come last


def key_names(keys: Sequence[Key] | None = None, above: str = "") -> Iterator[str]:
    """Yield every key that has a value, "training.steps" among them."""
    for key in run_file_keys() if keys is None else keys:
        if key.keys:
            yield from key_names(key.keys, f"{above}{key.name}.")
        else:
            yield above + key.name


@cache
def _source(module: str) -> ast.Module:
    return ast.parse(_PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))


def _keys_of(module: str, name: str) -> tuple[Key, ...]:
    """Return the keys of one class of facts, found in its module's source."""
    body = _class(module, name).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    docs = {id(node): _text(below) for node, below in zip(body, [*body[1:], ast.Pass()], strict=True)}
    return tuple(_key(module, node, docs[id(node)]) for node in fields)


def _key(module: str, field: ast.AnnAssign, doc: str) -> Key:
    assert isinstance(field.target, ast.Name)
    named = [node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)]
    homes = [home for name in named if (home := _home(module, name)) is not None]
    keys = [key for home in homes for key in _keys_of(*home)]
    if homes:
        doc = doc or ast.get_docstring(_class(*homes[0])) or ""
    return Key(field.target.id, doc, tuple({key.name: key for key in keys}.values()))


def _home(module: str, name: str) -> tuple[str, str] | None:
    """Return where a name in an annotation is defined as a class of facts; None for anything else."""
    for node in _source(module).body:
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            package, _, below = (node.module or "").partition(".")
            return _home(below, name) if package == "wantrain" and below else None
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (module, name) if any(isinstance(one, ast.Name) and one.id == "Fact" for one in node.bases) else None
    return None


def _class(module: str, name: str) -> ast.ClassDef:
    return next(node for node in _source(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def _text(node: ast.AST) -> str:
    """Return a docstring, on one line; an empty text for any other statement."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(node.value.value.split()) if is_text else ""  # type: ignore[attr-defined]


def commented(values: Mapping[str, Any], chosen: Mapping[str, Any], head: Sequence[str] = ()) -> str:
    """Return a run file with a comment for every key; keys that are not among the `chosen` are commented out."""
    lines = [f"# {line}".rstrip() for line in head]
    return "\n".join([*lines, *_lines(run_file_keys(), values, chosen, "", has_comments=True)]).lstrip("\n") + "\n"


def resolved(values: Mapping[str, Any]) -> str:
    """Return a run file with every key and nothing else."""
    return "\n".join(_lines(run_file_keys(), values, values, "", has_comments=False)).lstrip("\n") + "\n"


def _lines(
    keys: Sequence[Key], values: Mapping[str, Any], chosen: Mapping[str, Any], above: str, *, has_comments: bool
) -> Iterator[str]:
    for key in sorted(keys, key=lambda key: isinstance(values.get(key.name), Mapping)):  # TOML: tables come last
        if key.name not in values:
            continue
        value, doc = values[key.name], _comment(key.doc) if has_comments else []
        if isinstance(value, Mapping):
            yield from ("", *doc, f"[{above}{key.name}]")
            below = chosen.get(key.name)
            own = below if isinstance(below, Mapping) else {}
            yield from _lines(key.keys, value, own, f"{above}{key.name}.", has_comments=has_comments)
        else:
            yield from ([""] if has_comments else [])
            yield from doc
            yield ("" if key.name in chosen else "# ") + f"{key.name} = {toml_value(value)}"


def _comment(doc: str) -> list[str]:
    return [f"# {line}" for paragraph in doc.split("\n") for line in textwrap.wrap(paragraph, _WIDTH)]


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it; "null" for null, which run files read back."""
    if value is None:
        return '"null"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(one) for one in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
