"""The report's tables as text for a terminal and as Markdown, and the same numbers as CSV.

Imports rich only when it lays out for a terminal.
"""

import csv
import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sage.console import printable
from sage.report.groups import Group, Section
from sage.report.runs import Flat, mean_density, per_step
from sage.report.tables import (
    Sheet,
    best_score,
    bytes_sent_per_step,
    costs_to_reach,
    last_score,
    mean_and_deviation,
    mean_milliseconds,
    p99_density,
    target_density,
)

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
"""A row of the CSV, or a part of one, by column."""


def to_terminal(sheets: Sequence[Sheet], width: int) -> str:
    """Lay the tables out for a terminal. In 80 columns long texts are folded; numbers never are."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False, emoji=False)
    for sheet in sheets:
        console.print(sheet.title)
        console.print(_rich_table(sheet))
        console.print(f"{sheet.note}\n" if sheet.note else "")
    return text.getvalue()


def _rich_table(sheet: Sheet) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(sheet.columns):
        if i == 0 or name == "settings":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    return table


def to_markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(in_markdown(cell).replace("|", "\\|") for cell in cells) + " |"

    rules = ["---"] + ["---:"] * (len(sheet.columns) - 1)
    lines = [f"### {in_markdown(sheet.title)}", "", line(sheet.columns), line(rules), *map(line, sheet.rows)]
    return "\n".join([*lines, *(["", sheet.note] if sheet.note else [])]) + "\n"


def in_markdown(text: str) -> str:
    """A text from a run's files as one line of Markdown, in which it starts no HTML."""
    return printable(text.strip().replace("\n", " ")).replace("<", "&lt;")


# --- CSV ------------------------------------------------------------------------------------------


def to_csv(sections: Sequence[Section], target: float | None) -> str:
    """Write a row for each configuration, with full precision; each setting that differs is a column."""
    keys = _differing_settings([group.runs[0].config for section in sections for group in section.groups])
    rows = [
        _settings_record(section, group, keys) | _numbers_record(group) | _target_record(group, target)
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


def _differing_settings(configs: Sequence[Flat]) -> list[str]:
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


def _numbers_record(group: Group) -> Record:
    return {
        **_spread_record("last", group.values(last_score)),
        **_spread_record("best", group.values(best_score)),
        **_spread_record("density", group.values(mean_density)),
        **_spread_record("p99", group.values(p99_density)),
        "target_density": target_density(group),
        "payload_bytes_per_step": fmean(per_step(run, "bytes.payload") for run in group.runs),
        "wire_bytes_per_step": bytes_sent_per_step(group),
        **{f"{phase}_ms": value for phase, value in mean_milliseconds(group).items()},
    }


def _target_record(group: Group, target: float | None) -> Record:
    if target is None:
        return {}
    costs = costs_to_reach(group, target)
    return {
        "reached": len(costs),
        **_spread_record(f"epochs_to_{target:g}", [cost.epochs for cost in costs]),
        **_spread_record(f"seconds_to_{target:g}", [cost.seconds for cost in costs]),
        **_spread_record(f"bytes_to_{target:g}", [cost.bytes for cost in costs]),
    }


def _spread_record(name: str, values: Sequence[float]) -> Record:
    mean, deviation = mean_and_deviation(values)
    return {f"{name}.mean": mean, f"{name}.std": deviation}
