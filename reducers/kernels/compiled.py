"""How functions for the CPU are compiled. It imports numba, so it is imported when it is needed."""

import hashlib
import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding

from sage.locks import lock

LOCK_SECONDS = 60.0
"""How long a process waits while another one compiles the same function; then it compiles it, too."""


def cache_folder() -> str:
    """A folder for this kind of processor. Hosts that share a home, but not the kind of processor, would
    otherwise write under each other's names where they compile at once, and a processor cannot run what is
    for another. Empty where there is no home."""
    features = binding.get_host_cpu_features().flatten()
    kind = f"{binding.get_host_cpu_name()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
    try:
        return str(Path.home() / ".cache" / "sage" / kind)
    except RuntimeError:
        return ""


CACHE_FOLDER = cache_folder()
CONFIG: Any = numba.config
_THIS_PROCESS = threading.RLock()  # compiling a function compiles those that it calls


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call and kept on disk where a folder can be written. Threads run it
    side by side."""
    users_own = CONFIG.CACHE_DIR
    CONFIG.CACHE_DIR = users_own or CACHE_FOLDER
    try:
        dispatcher: Any = numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # no such folder
        return numba.njit(function, nogil=True)
    finally:
        CONFIG.CACHE_DIR = users_own
    path = Path(dispatcher.stats.cache_path) / f"{function.__name__}.lock"
    dispatcher.compile = _in_turn(dispatcher.compile, path)
    compiles_in_turn: Callable[..., Any] = dispatcher
    return compiles_in_turn


def _in_turn(compile_one: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """dispatcher.compile, for one process at a time: the first compiles, the others load what it has kept.

    numba writes its list of what is kept without a lock: of two processes that compile a function for other
    types, one could find there the other's.
    """

    @wraps(compile_one)
    def compile_in_turn(signature: Any) -> Any:
        with _THIS_PROCESS:
            held = _locked(path)
            try:
                return compile_one(signature)
            finally:
                if held is not None:
                    os.close(held)

    return compile_in_turn


def _locked(path: Path) -> int | None:
    """What is to be closed afterwards; None where the folder cannot be written, or after LOCK_SECONDS."""
    try:
        return lock(path, LOCK_SECONDS)
    except OSError:
        return None
