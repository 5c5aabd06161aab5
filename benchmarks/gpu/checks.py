"""What is checked and measured on a GPU: sections of checks, each of which returns rows of a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

Value = str | int | float | bool | None
Row = dict[str, Value]
"""A row of a section's table, by column. "failed" says why there is no figure, "left out" that there was no
time for it."""


@dataclass(frozen=True)
class Setup:
    """Where the checks run, and how large they are."""

    device: torch.device
    folder: Path
    """For data sets that are made, and for runs; deleted at the end."""
    small: bool
    """On a machine without a GPU: everything small on the CPU, to try the checks themselves."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def patience(self) -> float:
        """What all limits of time are multiplied by: a machine without a GPU may have much else to do."""
        return 5.0 if self.small else 1.0


class Check(NamedTuple):
    """One or a few measurements that fail together."""

    name: str
    measure: Callable[[], Iterable[Row]]
    seconds: float = 45.0
    """After so long it is given up, and its process killed."""


@dataclass(frozen=True)
class Section:
    """Checks that make up one table."""

    name: str
    meaning: str
    """What the columns mean: a paragraph above the table."""
    seconds: float
    """Kept free for this section; it may also use what the ones before it have not used."""
    checks: Callable[[Setup], list[Check]]
    fresh: bool = False
    """In a process of its own, since it changes settings of the whole process."""
