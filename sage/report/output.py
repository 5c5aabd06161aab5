"""The report's files: tables as Markdown, CSV and LaTeX, and pictures whose names say what they show.

Imports matplotlib only when it draws.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from sage import files
from sage.report.advice import Advice
from sage.report.curves import TITLES
from sage.report.formats import LATEX_HEAD, figure_in_latex, in_markdown, to_csv, to_latex, to_markdown
from sage.report.groups import Section
from sage.report.spread import Band
from sage.report.tables import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".pdf", ".svg")
"""The endings of a picture's name, which say what kind of file it is."""
MOST_IN_ONE_PROCESS = 4
"""Pictures: more are drawn by several processes, each of which takes a second to start."""


@dataclass(frozen=True)
class Output:
    """Where a report goes."""

    path: Path
    """The pictures' name and kind; .md, .csv and .tex lie beside it."""
    is_given: bool
    """Whether the user named it: then a picture that is the only one has this very name."""
    panels: Sequence[str]
    """The panels that have a picture each; empty: one picture of all panels."""


@dataclass(frozen=True)
class Content:
    """What a report says."""

    sections: Sequence[Section]
    sheets: Sequence[Sheet]
    notes: Sequence[str]
    target: float | None
    band: Band
    advice: Sequence[Advice]
    """Of the sections that another network was asked about for."""


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


def write_report(output: Output, content: Content) -> list[Path]:
    """Write the report's files; returns their paths, the first picture last."""
    pictures = plan_pictures(output, content)
    write_pictures(pictures)
    markdown = [
        *map(to_markdown, content.sheets),
        *(f"- {note}" for note in content.notes),
        *(f"![{in_markdown(picture.caption)}]({picture.path.name})" for picture in pictures),
    ]
    latex = [
        LATEX_HEAD,
        *map(to_latex, content.sheets),
        *(figure_in_latex(picture.path.name, picture.caption) for picture in pictures),
    ]
    table = to_csv(content.sections, content.target, content.band)
    texts = {".md": "\n".join(markdown) + "\n", ".csv": table, ".tex": "\n".join(latex)}
    for ending, text in texts.items():
        files.write_text(output.path.with_suffix(ending), text)
    paths = [picture.path for picture in pictures]
    return [*(output.path.with_suffix(ending) for ending in texts), *reversed(paths)]


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


def plan_pictures(output: Output, content: Content) -> list[Picture]:
    """All pictures of a report. Their names say the task, which part of it, and the panel."""
    pictures: list[Picture] = []
    names = dict(zip(map(id, content.sections), _names(content.sections), strict=True))
    for section in content.sections:
        pictures += _section_pictures(output, section, names[id(section)], content.band)
    for advice in content.advice:
        pictures.append(_advice_picture(output, advice, names[id(advice.section)]))
    if output.is_given and len(pictures) == 1:
        return [replace(pictures[0], path=output.path)]
    return pictures


def _section_pictures(output: Output, section: Section, name: str, band: Band) -> Iterator[Picture]:
    from sage.report.figures import draw, draw_single, pages

    divided = pages(section, band)
    for number, page in enumerate(divided, 1):
        stem = f"{output.path.stem}-{name}" + (f"-part{number}" if len(divided) > 1 else "")
        path = output.path.with_stem(stem)
        spread = f". {page.caption}" if page.caption else ""
        if not output.panels:
            yield Picture(path, page.title + spread, partial(draw, page))
        for panel in output.panels:
            title = f"{TITLES[panel]}: {page.title}{spread}"
            yield Picture(path.with_stem(f"{stem}-{panel}"), title, partial(draw_single, page, panel))


def _advice_picture(output: Output, advice: Advice, name: str) -> Picture:
    from sage.report.advice import draw_advice

    path = output.path.with_stem(f"{output.path.stem}-{name}-network")
    return Picture(path, f"Predicted over networks: {advice.title}", partial(draw_advice, advice))


def _names(sections: Sequence[Section]) -> Iterator[str]:
    """A name for each section's pictures, no two alike: "digits, world size 2" is digits-2workers."""
    seen: Counter[str] = Counter()
    for section in sections:
        name = re.sub(r", world size (\d+)", r"-\1workers", section.workload)
        name = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"
