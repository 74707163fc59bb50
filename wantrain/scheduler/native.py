"""Turn loops written as plain Python into machine code, only where that pays.

The search's loops are functions over flat sequences. For a dozen workers they run as they are, on lists: numba's import
alone takes longer than the whole search. For more they are compiled, on arrays. Both do the same additions in the same
order and call nothing of a C library, so a plan doesn't depend on which of the two made it, nor on the machine.

Numba keeps machine code on disk and holds it to be fresh while the outermost function's file is unchanged. So the code
carries a fingerprint of all files that its functions come from, and where no folder can be written it lives as long as
the process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

Result = TypeVar("Result")

_NO_CACHE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)
"""No folder, no room, no permission; no locator found (numba's RuntimeError); a file cut short by a crash."""


@functools.cache
def compiled(function: Callable[..., Any], *helpers: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as machine code, together with the functions that it calls, made at its first call."""
    ready: list[Callable[..., Any]] = []
    making = threading.Lock()

    def call(*args: Any) -> Any:
        if not ready:
            with making:  # a thread that comes meanwhile waits for the same
                if not ready:
                    ready.append(_machine_code((*helpers, function), args))
        return ready[0](*args)

    return call


def on_all_processors(work: Callable[..., Result], *many: Iterable[Any]) -> list[Result]:
    """Return what `work` makes of each, in their order; machine code runs side by side, Python one at a time."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(work, *many))


def _machine_code(functions: tuple[Callable[..., Any], ...], args: tuple[Any, ...]) -> Callable[..., Any]:
    import numba

    typeof: Any = numba.typeof  # only some versions of numba have types
    signature = tuple(typeof(arg) for arg in args)
    try:
        code = _jit(functions, cache=True)
        code.compile(signature)
    except _NO_CACHE:
        code = _jit(functions, cache=False)
        code.compile(signature)
    found: Callable[..., Any] = code
    return found


def _jit(functions: tuple[Callable[..., Any], ...], cache: bool) -> Any:
    """Compile functions that call each other by name: each sees the others' machine code in its globals."""
    import numba

    scope: dict[str, Any] = {}
    for function in functions:
        scope |= {name: value for name, value in function.__globals__.items() if name not in scope}
    mark = _fingerprint(tuple(sorted({function.__code__.co_filename for function in functions})))
    code: Any = None
    for function in functions:
        is_last = function is functions[-1]
        plain = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
        plain.__module__ = function.__module__
        plain.__qualname__ = f"{function.__name__}_{mark}"
        wrappers: dict[str, Any] = {
            "no_cfunc_wrapper": True,
            "no_cpython_wrapper": not is_last,
        }  # half of the compiling
        code = numba.njit(nogil=True, error_model="numpy", cache=cache and is_last, **wrappers)(plain)
        scope[function.__name__] = code
    return code


@functools.cache
def _fingerprint(paths: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:12]
