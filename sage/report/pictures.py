"""The report's pictures: how configurations are divided among them, and how they are written.

Imports matplotlib only when it draws: where there are many pictures, that is in other processes.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from sage import files
from sage.report.groups import Group, Section
from sage.report.looks import Style, styles_of
from sage.report.spread import BANDS, Band

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".pdf", ".svg")
"""The endings of a picture's name, which say what kind of file it is."""
MOST_PER_PICTURE = 8
"""Configurations in one picture: more lines in a panel are hard to tell apart."""
MOST_PICTURES = 12
"""Of a section: of very many configurations each has more. A picture takes a second, whatever is in it."""
MOST_IN_ONE_PROCESS = 4
"""Pictures: more are drawn by several processes, each of which takes a second to start."""


@dataclass(frozen=True)
class Page:
    """What is drawn in one picture: some of a section's configurations."""

    workload: str
    score: str
    """The score's name."""
    groups: list[Group]
    styles: list[Style]
    band: Band
    part: str
    """Which of the section's configurations, in words; empty where these are all."""

    @property
    def title(self) -> str:
        return self.workload + (f", {self.part}" if self.part else "")

    @property
    def caption(self) -> str:
        """What lines and bands are, in words; empty where every configuration has one seed."""
        if all(len(group.runs) == 1 for group in self.groups):
            return ""
        return f"lines: means over seeds; bands: {BANDS[self.band]}"


def pages(section: Section, band: Band = "std") -> list[Page]:
    """Divide a section into pictures of about as many configurations each."""
    count = len(section.groups)
    size = ceil(count / min(ceil(count / MOST_PER_PICTURE), MOST_PICTURES))
    styles = styles_of([group.reducer for group in section.groups])
    return [
        Page(
            section.workload,
            section.score,
            section.groups[start : start + size],
            styles[start : start + size],
            band,
            "" if size >= count else f"configurations {start + 1} to {min(start + size, count)} of {count}",
        )
        for start in range(0, count, size)
    ]


@dataclass(frozen=True)
class Picture:
    """A picture that is to be drawn."""

    path: Path
    caption: str
    draw: "Callable[[], Figure]"

    def write(self) -> None:
        """Draw it, and write it to its file."""
        from sage.report.figures import to_file

        files.write_bytes(self.path, to_file(self.draw(), self.path.suffix[1:]))


def write_pictures(pictures: Sequence[Picture]) -> None:
    """Draw all pictures; many of them in as many processes as this one may use cores."""
    num_processes = min(len(os.sched_getaffinity(0)), len(pictures))
    if len(pictures) <= MOST_IN_ONE_PROCESS or num_processes == 1:
        for picture in pictures:
            picture.write()
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(Picture.write, pictures):  # raises what one of them raised
            pass


def draw_page(page: Page) -> "Figure":
    """All panels of a page."""
    from sage.report.figures import draw

    return draw(page)


def draw_panel(page: Page, name: str) -> "Figure":
    """One panel of a page."""
    from sage.report.figures import draw_single

    return draw_single(page, name)
