"""What must be the same on all hosts of a job: Python, torch and wantrain, down to its source.

Two versions of wantrain may plan, quantize or send differently, and neither would notice. So besides the version the
source counts: a digest of all of it, which also sees what was edited in a clone. The commit is there for the reader.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import xxhash

from wantrain.errors import ConfigError
from wantrain.fact import Fact

_PACKAGES = ("wantrain", "wantrain_kernels")


class Environment(Fact):
    """A host's Python, torch and wantrain."""

    python: str
    torch: str
    wantrain: str
    source: str
    """Digest of wantrain's source files."""
    commit: str
    """Where it is a clone; "+" where something in it is not committed."""

    @classmethod
    def here(cls) -> Self:
        """Look at this machine; torch isn't loaded for it."""
        return cls(
            python=platform.python_version(),
            torch=_version("torch"),
            wantrain=_version("wantrain"),
            source=_source_digest(),
            commit=_commit(),
        )

    def require_same(self, other: Environment, host: str) -> None:
        """Raise ConfigError where another host's environment differs in what matters.

        Python's patch level and torch's build (+cpu, +cu128) may differ.
        """
        for what, here, there in (
            ("Python", _minor(self.python), _minor(other.python)),
            ("torch", self.torch.partition("+")[0], other.torch.partition("+")[0]),
        ):
            if here != there:
                raise ConfigError(f"host '{host}' has another {what} (got {there}, expected {here}); install the same")
        if (self.wantrain, self.source) != (other.wantrain, other.source):
            got, expected = other.describe_wantrain(), self.describe_wantrain()
            raise ConfigError(f"host '{host}' has another wantrain (got {got}, expected {expected}); use one commit")

    def describe_wantrain(self) -> str:
        """Name version, source and, where it is a clone, the commit."""
        where = f" at {self.commit}" if self.commit else ""
        return f"{self.wantrain}, source {self.source[:8]}{where}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _folders() -> Iterator[Path]:
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield Path(place)


def _source_digest() -> str:
    digest = xxhash.xxh3_64()
    for folder in _folders():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _commit() -> str:
    """Return the commit of the clone that wantrain runs from, or nothing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except OSError:  # no git here; the digest says the same
        return ""
