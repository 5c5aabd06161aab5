"""How functions for the CPU are compiled. It imports numba, so it is imported when it is needed."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call and kept on disk where a folder can be written: this one, or
    the user's cache. Threads run it side by side."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # no such folder
        return numba.njit(function, nogil=True)
