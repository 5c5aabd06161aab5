"""The report's tables as text for a terminal, as Markdown and as LaTeX, and the same numbers as CSV."""

import csv
import io
import re
import textwrap
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from sage.console import printable
from sage.report.groups import Group, Section
from sage.report.runs import Flat, mean_density, per_step, unaccounted_milliseconds
from sage.report.spread import Band, Spread
from sage.report.tables import (
    Sheet,
    best_score,
    bytes_sent_per_step,
    costs_to_reach,
    last_score,
    mean_milliseconds,
    p99_density,
    target_density,
)

FOLDED = "settings"
"""The column whose texts are folded where they are long, as the first one's are."""
MOST_FOR_FIRST = 24
"""Characters of the first column beside which others are placed; more are folded."""
GAP = 3
"""Characters between two columns."""
Record = dict[str, Any]
"""A row of the CSV, or a part of one, by column."""


def to_terminal(sheets: Sequence[Sheet], width: int) -> str:
    """Lay the tables out for a terminal. Long texts are folded, numbers never are: a table that is wider than
    the terminal continues below, with its first column again."""
    parts = []
    for sheet in sheets:
        tables = (_terminal_table(sheet, columns, width) for columns in blocks_of(sheet, width))
        note = [_folded(sheet.note, width), ""] if sheet.note else []
        parts += [_folded(sheet.title, width), "", *tables, *note]
    return printable("\n".join(parts)) + "\n"


def blocks_of(sheet: Sheet, width: int) -> list[list[int]]:
    """Divide a table's columns after the first into as few blocks as fit beside it in a terminal's width, all
    about as wide."""
    first, *widths = _widths_of(sheet.columns, sheet.rows)
    needed = [
        GAP + (1 if name == FOLDED else each) for name, each in zip(sheet.columns[1:], widths, strict=True)
    ]
    left = min(first, MOST_FOR_FIRST)
    blocks = _fill(needed, width - left)
    while len(narrower := _fill(needed, width - left - 1)) == len(blocks) and width > 0:
        blocks, width = narrower, width - 1
    return blocks


def _widths_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The longest line of each column."""
    return [
        max(len(line) for cell in column for line in cell.splitlines() or [""])
        for column in zip(columns, *rows, strict=True)
    ]


def _fill(needed: Sequence[int], width: int) -> list[list[int]]:
    """Divide columns, numbered from 1, into blocks that are as full as a width allows. needed: characters."""
    blocks: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(needed, 1):
        if blocks[-1] and used + size > width:
            blocks.append([])
            used = 0
        blocks[-1].append(index)
        used += size
    return blocks


def _terminal_table(sheet: Sheet, columns: Sequence[int], width: int) -> str:
    """The first column and some others: texts to the left and folded, numbers to the right."""
    chosen = [0, *columns]
    names = [sheet.columns[index] for index in chosen]
    rows = [[row[index] for index in chosen] for row in sheet.rows]
    sizes = _widths_of(names, rows)
    texts = [index for index, name in enumerate(names) if index == 0 or name == FOLDED]
    room = width - 2 - sum(GAP + size for index, size in enumerate(sizes) if index not in texts)
    for count, index in enumerate(texts):  # the last text takes what those before it leave
        others = len(texts) - count - 1
        sizes[index] = max(1, min(sizes[index], room if not others else min(MOST_FOR_FIRST, room - others)))
        room -= sizes[index] + GAP
    lines = _terminal_lines(names, sizes, texts, is_heading=True)
    lines.append(" " + "─" * (sum(sizes) + GAP * (len(sizes) - 1)))
    for row in rows:
        lines += _terminal_lines(row, sizes, texts)
    return "\n".join([*lines, ""])


def _terminal_lines(
    row: Sequence[str], sizes: Sequence[int], texts: Sequence[int], is_heading: bool = False
) -> list[str]:
    """A row, in as many lines as its highest cell has. The other cells begin with it; a heading's end with
    it."""
    columns = []
    for index, (cell, size) in enumerate(zip(row, sizes, strict=True)):
        lines = _folded(cell, size).split("\n") if index in texts else cell.splitlines()
        columns.append([line.ljust(size) if index in texts else line.rjust(size) for line in lines])
    height = max(map(len, columns))
    for lines, size in zip(columns, sizes, strict=True):
        empty = [" " * size] * (height - len(lines))
        lines[:] = [*empty, *lines] if is_heading else [*lines, *empty]
    return [(" " + (" " * GAP).join(line)).rstrip() for line in zip(*columns, strict=True)]


def _folded(text: str, width: int) -> str:
    """The text with its lines folded at a width, between words where it can be."""
    return "\n".join(
        "\n".join(textwrap.wrap(line, width, break_on_hyphens=False) or [""]) for line in text.split("\n")
    )


def to_markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(in_markdown(cell).replace("|", "\\|") for cell in cells) + " |"

    rules = ["---"] + ["---:"] * (len(sheet.columns) - 1)
    lines = [f"### {in_markdown(sheet.title)}", "", line(sheet.columns), line(rules), *map(line, sheet.rows)]
    return "\n".join([*lines, *(["", sheet.note] if sheet.note else [])]) + "\n"


def in_markdown(text: str) -> str:
    """A text from a run's files as one line of Markdown, in which it starts no HTML."""
    return printable(text.strip().replace("\n", " ")).replace("<", "&lt;")


# --- LaTeX ----------------------------------------------------------------------------------------

LATEX_HEAD = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def to_latex(sheet: Sheet) -> str:
    """A table with its caption."""
    caption = ". ".join(in_latex(text) for text in (sheet.title, sheet.note.replace("\n", "; ")) if text)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption}.}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
        r"    \toprule",
        _latex_row(sheet.columns),
        r"    \midrule",
        *map(_latex_row, sheet.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def figure_in_latex(name: str, caption: str) -> str:
    """A picture by its file's name, with its caption."""
    lines = [
        r"\begin{figure}",
        r"  \centering",
        rf"  \includegraphics[width=\linewidth]{{{name}}}",
        rf"  \caption{{{in_latex(caption)}.}}",
        r"\end{figure}",
    ]
    return "\n".join(lines) + "\n"


def in_latex(text: str) -> str:
    """A text from a run's files as LaTeX, in which it starts no command; a minus sign before a number is
    one."""
    one_line = printable(text.strip().replace("\n", " "))
    escaped = "".join(_LATEX.get(character, character) for character in one_line)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def _latex_row(cells: Sequence[str]) -> str:
    return "    " + " & ".join("--" if cell == "-" else in_latex(cell) for cell in cells) + r" \\"


# --- CSV ------------------------------------------------------------------------------------------


def to_csv(sections: Sequence[Section], target: float | None, band: Band = "std") -> str:
    """Write a row for each configuration, with full precision; each setting that differs is a column.

    band: the spread beside each mean, named in the columns.
    """
    keys = differing_settings([group.runs[0].config for section in sections for group in section.groups])
    rows = [
        _settings_record(section, group, keys)
        | _numbers_record(group, band)
        | _target_record(group, target, band)
        for section in sections
        for group in section.groups
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writerow({key: as_cell(key) for key in rows[0]})
    writer.writerows({key: as_cell(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def as_cell(value: Any) -> Any:
    """A value as a cell that no spreadsheet takes for a formula; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return "'" + printable(value) if value[:1] in ("=", "+", "-", "@", "\t", "\r") else printable(value)


def differing_settings(configs: Sequence[Flat]) -> list[str]:
    """The settings that are not the same in all configurations; not the seed."""
    keys = sorted(set().union(*configs) - {"seed"})
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def _settings_record(section: Section, group: Group, keys: list[str]) -> Record:
    config = group.runs[0].config
    return {
        "workload": section.workload,
        "run": group.label,
        "done": group.done,
        **{key: config.get(key) for key in keys},
        "seeds": " ".join(str(run.config.get("seed")) for run in group.runs),
        "score": section.score,
    }


def _numbers_record(group: Group, band: Band) -> Record:
    return {
        **_spread_record("last", group.values(last_score), band),
        **_spread_record("best", group.values(best_score), band),
        **_spread_record("density", group.values(mean_density), band),
        **_spread_record("p99", group.values(p99_density), band),
        "target_density": target_density(group),
        "payload_bytes_per_step": fmean(per_step(run, "bytes.payload") for run in group.runs),
        "wire_bytes_per_step": bytes_sent_per_step(group),
        **{f"{phase}_ms": value for phase, value in mean_milliseconds(group).items()},
        "other_ms": Spread.of(group.values(unaccounted_milliseconds)).mean,
    }


def _target_record(group: Group, target: float | None, band: Band) -> Record:
    if target is None:
        return {}
    costs = costs_to_reach(group, target)
    return {
        "reached": len(costs),
        **_spread_record(f"epochs_to_{target:g}", [cost.epochs for cost in costs], band),
        **_spread_record(f"seconds_to_{target:g}", [cost.seconds for cost in costs], band),
        **_spread_record(f"bytes_to_{target:g}", [cost.bytes for cost in costs], band),
    }


def _spread_record(name: str, values: Sequence[float], band: Band) -> Record:
    mean, width = Spread.of(values, band)
    return {f"{name}.mean": mean, f"{name}.{band}": width}
