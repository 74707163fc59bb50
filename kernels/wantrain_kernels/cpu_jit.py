"""How the loops of the CPU backend become machine code, and where that is kept.

Numba compiles a kernel at its first call (seconds) and keeps the result on disk, in `NUMBA_CACHE_DIR`, `__pycache__`
or the user's cache folder, so that a later process loads it in milliseconds. Its own rule has two gaps: an entry counts
as fresh while the file of the outermost function is unchanged, whatever it calls; and where no folder can be written,
or what was kept can't be read, it raises. So kernels carry a fingerprint of all sources in their name, and without a
usable cache the code lives as long as the process.

The workers of a job on one machine all need the same code at once. One of them makes it, the others wait and load it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_numba: Any = numba
"""Only some versions of it have types."""

_OPTIONS = {"nogil": True, "error_model": "numpy", "forceinline": True}
"""No lock, so that codec threads overlap; a division by zero gives infinity, no branch. Never fast-math."""

_NO_CACHE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)
"""No folder, no room, no permission; no locator found (numba's RuntimeError); a file cut short by a crash."""

_lock = threading.Lock()


def compiled(function: F) -> F:
    """Compile a function that kernels call."""
    return cast(F, _numba.njit(**_OPTIONS)(function))


def kernel(function: F) -> F:
    """Compile a function at its first call, for the types of that call; later ones must have the same."""
    ready: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not ready:
            with _lock:
                if not ready:
                    ready.append(_machine_code(function, args))
        return ready[0](*args)

    return cast(F, call)


def _machine_code(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    function.__qualname__ = f"{function.__name__}_{fingerprint()}"
    signature = tuple(_numba.typeof(arg) for arg in args)
    try:
        with _only_process(function.__qualname__):
            code = _numba.njit(cache=True, **_OPTIONS)(function)
            code.compile(signature)
    except _NO_CACHE:
        code = _numba.njit(**_OPTIONS)(function)
        code.compile(signature)
    return cast(Callable[..., Any], code)


@contextlib.contextmanager
def _only_process(name: str) -> Iterator[None]:
    """Let one of this user's processes at a time do what is to be done once; a lock dies with its process."""
    path = Path(tempfile.gettempdir(), f"wantrain-{os.getuid()}-{name}.lock")
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def fingerprint() -> str:
    """Return what changes with any source that machine code is made from."""
    sources = sorted(Path(__file__).parent.glob("cpu_*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
