"""Published figures beside ours: which of published.yaml belong to a configuration, and their table."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Literal

from sage import yamlfile
from sage.config import Settings
from sage.report.groups import Group, Section
from sage.report.runs import Flat, mean_density, per_step
from sage.report.tables import Sheet, best_score, format_number, format_signed, last_score

FILE = Path(__file__).with_name("published.yaml")


class Figure(Settings):
    """What was published of one configuration."""

    config: dict[str, str | int | float]
    """What a run's configuration must have, beside its table's `where`."""
    value: float | int | None = None
    """The score."""
    density: float | int | None = None
    """The density that was achieved, mean over steps."""
    mebibytes: float | int | None = None
    """What a worker hands to collectives in so many steps."""
    steps: int = 0


class Table(Settings):
    """Figures of one source."""

    source: str
    caveat: str
    """What is not as here."""
    where: dict[str, str | int | float]
    score: str
    which: Literal["last", "best"]
    rows: list[Figure]

    def find(self, config: Flat) -> Figure | None:
        """The figure of a configuration; None where it has none."""
        for row in self.rows:
            if all(config.get(key) == value for key, value in {**self.where, **row.config}.items()):
                return row
        return None


@cache
def read_tables() -> tuple[Table, ...]:
    return tuple(Table.model_validate(raw) for raw in yamlfile.read(FILE))


def published_sheet(section: Section) -> Sheet | None:
    """Ours beside what was published, a row for each figure; None where there is none of this section."""
    found = [
        (group, table, row)
        for table in read_tables()
        for group in section.groups
        if group.done and (row := table.find(group.runs[0].config))
    ]
    if not found:
        return None
    score = section.score
    columns = [
        "run",
        f"{score}\nours",
        f"{score}\npublished",
        "differ-\nence",
        "density\nours",
        "density\npublished",
    ]
    columns += ["payload\nours", "payload\npublished"]
    rows = [[group.short_label, *_cells(group, table, row)] for group, table, row in found]
    sources = dict.fromkeys(f"{table.source} ({table.caveat})" for _, table, _ in found)
    note = "\n".join([*sources, "payload: MiB in as many steps as published"])
    return Sheet(f"Beside published figures: {section.workload}", columns, rows, note)


def _cells(group: Group, table: Table, row: Figure) -> list[str]:
    scores = group.values(last_score if table.which == "last" else best_score)
    ours = _mean(scores) if row.value is not None else None
    density = _mean(group.values(mean_density)) if row.density is not None else None
    payload = None
    if row.mebibytes is not None:
        payload = row.steps * fmean(per_step(run, "bytes.payload") for run in group.runs) / 2**20
    difference = "-" if ours is None or row.value is None else format_signed(ours - row.value)
    return [
        format_number(ours, 4),
        "-" if row.value is None else f"{row.value:g}",
        difference,
        format_number(density),
        "-" if row.density is None else f"{row.density:g}",
        format_number(payload),
        "-" if row.mebibytes is None else f"{row.mebibytes:g}",
    ]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
