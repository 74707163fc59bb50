"""Find the files that come with wantrain, in a checkout and in an installed wheel alike.

A checkout keeps them in `configs/` and `benchmarks/` beside the package; the wheel carries both folders inside it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from wantrain.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def program() -> str:
    """Return how the user can call wantrain from here: by its name where PATH has it, else by its path."""
    beside = Path(sys.executable).with_name("wantrain")
    if shutil.which("wantrain") is not None or not beside.exists():
        return "wantrain"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def configs_folder() -> Path:
    """Return the folder of the shipped configurations."""
    return _folder("configs")


def benchmarks_folder() -> Path:
    """Return the folder of the benchmark programs."""
    return _folder("benchmarks")


def _folder(name: str) -> Path:
    return (_PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").exists() else _PACKAGE) / name


def shipped(kind: str) -> list[str]:
    """Return the names of the shipped files of a kind: "topologies", "models" or "runs"."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.toml"))


def find_config(kind: str, given: str, error: type[UserError]) -> Path:
    """Return the file that the user means, by path or by the name of a shipped one; raise `error` for neither."""
    path = Path(given)
    if path.is_file():
        return path
    if path.suffix or path.name != given:
        raise error(f"can't find {given}; give the path of a TOML file, or one of {', '.join(shipped(kind))}")
    known = shipped(kind)
    if given in known:
        return configs_folder() / kind / f"{given}.toml"
    choices = f"expected a file, or one of {', '.join(known)}"
    raise error(f"there is no '{given}' among the {kind}{did_you_mean(given, known)}; {choices}")
