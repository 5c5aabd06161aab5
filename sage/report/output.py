"""The report's files: tables as Markdown, CSV and LaTeX, and pictures whose names say what they show.

Imports matplotlib only when it draws.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sage import files
from sage.report.advice import Advice, draw_advice
from sage.report.curves import TITLES
from sage.report.formats import LATEX_HEAD, figure_in_latex, in_markdown, to_csv, to_latex, to_markdown
from sage.report.groups import Section
from sage.report.pictures import Picture, draw_page, draw_panel, pages, write_pictures
from sage.report.spread import Band
from sage.report.tables import Sheet


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
class Chapter:
    """What a report says of a section."""

    section: Section
    sheets: Sequence[Sheet]
    advice: Advice | None
    """Where another network was asked about."""


@dataclass(frozen=True)
class Content:
    """What a report says."""

    chapters: Sequence[Chapter]
    notes: Sequence[str]
    target: float | None
    band: Band

    @property
    def sections(self) -> list[Section]:
        return [chapter.section for chapter in self.chapters]

    @property
    def sheets(self) -> list[Sheet]:
        return [sheet for chapter in self.chapters for sheet in chapter.sheets]


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


def plan_pictures(output: Output, content: Content) -> list[Picture]:
    """All pictures of a report. Their names say the task, which part of it, and the panel."""
    pictures: list[Picture] = []
    for chapter, name in zip(content.chapters, _names(content.sections), strict=True):
        pictures += _section_pictures(output, chapter.section, name, content.band)
        pictures += [_advice_picture(output, chapter.advice, name)] if chapter.advice else []
    if output.is_given and len(pictures) == 1:
        return [replace(pictures[0], path=output.path)]
    return pictures


def _section_pictures(output: Output, section: Section, name: str, band: Band) -> Iterator[Picture]:
    divided = pages(section, band)
    for number, page in enumerate(divided, 1):
        stem = f"{output.path.stem}-{name}" + (f"-part{number}" if len(divided) > 1 else "")
        path = output.path.with_stem(stem)
        spread = f". {page.caption}" if page.caption else ""
        if not output.panels:
            yield Picture(path, page.title + spread, partial(draw_page, page))
        for panel in output.panels:
            title = f"{TITLES[panel]}: {page.title}{spread}"
            yield Picture(path.with_stem(f"{stem}-{panel}"), title, partial(draw_panel, page, panel))


def _advice_picture(output: Output, advice: Advice, name: str) -> Picture:
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
