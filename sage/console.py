"""Everything that speaks to a person: lines on stdout and stderr.

Imports no torch, and rich only when something is printed. Of a run only one process speaks (rank 0; before
the workers have met, the first of its host): the caller decides.
"""

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> "Console":
    """The terminal that lines and the progress bar share."""
    from rich.console import Console

    return Console(stderr=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line of its own, which a running progress bar does not tear."""
    console().print(text, markup=False)


def show(text: str, speaks: bool = True) -> int:
    """Print an answer on stdout, where this process speaks and as far as somebody reads it; returns the exit
    code 0."""
    try:
        if speaks:
            print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:  # `| head`: what is still buffered must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def complain(message: str, program: str = "run.py") -> int:
    """Print the lines of an error on stderr; returns the exit code for bad input, 2."""
    for line in message.splitlines():
        print(f"{program}: {line}", file=sys.stderr)
    return 2


def first_line(error: BaseException) -> str:
    """The first line of an error's text: torch's errors carry a stack after it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def readable_bytes(count: float) -> str:
    """1234567 -> '1.23 MB'; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
