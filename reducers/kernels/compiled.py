"""How functions for the CPU are compiled. It imports numba, so it is imported when it is needed."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding


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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call and kept on disk where a folder can be written. Threads run it
    side by side."""
    users_own = CONFIG.CACHE_DIR
    CONFIG.CACHE_DIR = users_own or CACHE_FOLDER
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # no such folder
        return numba.njit(function, nogil=True)
    finally:
        CONFIG.CACHE_DIR = users_own
