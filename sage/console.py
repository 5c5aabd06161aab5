"""Everything that speaks to a person: lines on stdout and stderr.

Imports no torch, and rich only when something is printed. Of a run only one process speaks (rank 0; before
the workers have met, the first of its host): the caller decides.
"""

import os
import re
import shutil
import sys
import textwrap
from functools import cache
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> "Console":
    """The terminal that lines and the progress bar share."""
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process
            _forget(sys.stdout)

    return LastingConsole(stderr=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line of its own, which a running progress bar does not tear. A run goes on where nobody reads
    what it says any more: `| head` has ended, the terminal is closed, the disk of a log is full."""
    _lenient(sys.stdout)
    try:
        console().print(printable(text), markup=False)
    except OSError:
        _forget(sys.stdout)


def show(text: str, speaks: bool = True) -> int:
    """Print an answer on stdout, where this process speaks and as far as somebody reads it; returns the exit
    code: 0, or 1 where it cannot be written."""
    try:
        if speaks:
            print(printable(text.rstrip("\n")), file=_lenient(sys.stdout), flush=True)
    except OSError as error:  # what is still buffered must not fail once more at exit
        _forget(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            complain(f"the answer cannot be written: {error.strerror}")
            return 1
    return 0


def terminal_width(otherwise: int) -> int:
    """The columns of the terminal, 40 or more; another number where there is none."""
    return max(40, shutil.get_terminal_size((otherwise, 24)).columns)


def fold_items(text: str, width: int, indent: int) -> str:
    """Lines that begin with a name, folded at a width; what follows in a line is indented below its first
    words."""
    return "\n".join(
        textwrap.fill(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        for line in text.splitlines()
    )


def complain(message: str, program: str = "run.py") -> int:
    """Print the lines of an error on stderr; returns the exit code for bad input, 2."""
    for line in message.splitlines():
        try:
            print(printable(f"{program}: {line}"), file=_lenient(sys.stderr), flush=True)
        except OSError:
            _forget(sys.stderr)
    return 2


_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but line ends and tabs, marks that turn a text's direction, and half characters."""


def printable(text: str) -> str:
    """The text with what would steer a terminal made visible: an escape character is \\x1b."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _lenient(stream: TextIO) -> TextIO:
    """The stream, which from now on writes what its encoding does not know as \\N escapes."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _forget(stream: TextIO) -> None:
    """Let a stream that can no longer be written to go nowhere, also what it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


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


def describe_gap(epochs: set[int], num_epochs: int) -> str:
    """Which of the first epochs are not among those given, in words: "epochs 2, 3 have no line"."""
    missing = sorted(set(range(num_epochs)) - epochs)
    if not missing:
        return ""
    names = ", ".join(str(epoch + 1) for epoch in missing[:10]) + (", ..." if len(missing) > 10 else "")
    return f"epoch {names} has no line" if len(missing) == 1 else f"epochs {names} have no line"
