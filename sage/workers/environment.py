"""Environment variables that count only if they are set before torch is imported."""

import os

DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""PASSIVE: threads that wait for one another sleep. By default they spin, and where other programs use the
cores a step takes 20 times as long, since those waited for do not run. The numbers are the same."""
INSTEAD = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Where the user has set one of these, the user's choice stands."""


def set_defaults() -> None:
    """Set what the user has not set. Call it before torch is imported."""
    if not any(name in os.environ for name in INSTEAD):
        os.environ.update(DEFAULTS)
