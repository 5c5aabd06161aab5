"""The report's tables: a row a configuration, in a terminal, in Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from sage.console import printable
from sage.report.groups import Group, Section, exact_for
from sage.report.runs import COMPUTE, Flat, Run, density_mean, per_step, phases, spread, training_seconds

SPREAD = "± standard deviation over seeds"
SIMULATED = "\nsimulated: one worker's times, taken alone on the machine; communication has none"
Record = dict[str, Any]
"""A row of the CSV, or a part of one, by column."""


@dataclass(frozen=True)
class Sheet:
    """A table in no form yet. The first column is text, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str


# --- numbers as text ------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, zeros too: 0.970, 52.1, 1,234; '-' for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def with_spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation: '0.9700 ±0.0012'; the mean alone of a single value."""
    mean, deviation = spread(values)
    return number(mean, digits) + (f" ±{number(deviation, 2)}" if deviation is not None else "")


def ratio(mine: float, exacts: float) -> str:
    """How much less or more than exact: '50.0x less'; '-' where either is nothing."""
    if not mine or not exacts:
        return "-"
    if mine == exacts:
        return f"{number(1.0)}x"
    return f"{number(exacts / mine)}x less" if mine < exacts else f"{number(mine / exacts)}x more"


# --- a group's rows -------------------------------------------------------------------------------


def last_score(run: Run) -> float | None:
    value = run.summary.get("score.last", run.epochs[-1]["score.value"] if run.epochs else None)
    return None if value is None else float(value)


def best_score(run: Run) -> float | None:
    return run.summary.get("score.best")


def p99(run: Run) -> float | None:
    return run.summary.get("density.p99")


def target_density(group: Group) -> float | None:
    """None for a dense reducer, and before the first step line."""
    steps = group.runs[0].steps
    return steps[-1].get("target_density") if steps else None


def sent_per_step(group: Group) -> float:
    """Bytes that one worker sends in a step."""
    return fmean(per_step(run, "bytes.wire") for run in group.runs)


def milliseconds(group: Group) -> dict[str, float]:
    """Per step by phase, the mean over seeds."""
    times = [phases(run) for run in group.runs]
    return {phase: fmean(time[phase] for time in times) for phase in times[0]}


def results_row(group: Group) -> list[str]:
    """Seeds, score last and best."""
    scores = [with_spread(group.values(of), 4) for of in (last_score, best_score)]
    return [str(len(group.runs)), *scores]


def bytes_row(group: Group, exact: Group | None) -> list[str]:
    """Density mean / target and p99, megabytes sent and, per step, against exact's."""
    target = target_density(group)
    density = with_spread(group.values(density_mean), 3) + (f" / {target:g}" if target else "")
    tail = group.values(p99)
    megabytes = fmean(sum(line["bytes.wire"] for line in run.epochs) for run in group.runs) / 1e6
    against = ratio(sent_per_step(group), sent_per_step(exact)) if exact else "-"
    return [density, number(fmean(tail) if tail else None), number(megabytes, 4), against]


def time_row(group: Group, exact: Group | None) -> list[str]:
    """Milliseconds per step, and the steps made while exact makes one."""
    times = milliseconds(group)
    compute = sum(times[phase] for phase in COMPUTE)
    total = compute + times["compression"] + times["communication"]
    if not total:
        return ["-"] * 5
    computed = [number(compute), number(times["compression"])]
    if group.runs[0].simulated:
        return [*computed, "-", "-", "-"]
    speed = f"{number(sum(milliseconds(exact).values()) / total)}x" if exact else "-"
    return [*computed, number(times["communication"]), number(total), speed]


class Cost(NamedTuple):
    """What training took one worker so far."""

    epochs: float
    seconds: float
    bytes: float


def first_reached(run: Run, target: float) -> Cost | None:
    """What it took until the score was first the target or better; None: it never was."""
    higher = run.summary.get("score.higher_is_better", True)
    seconds = sent = 0.0
    for line in run.epochs:
        seconds += training_seconds(line)
        sent += line["bytes.wire"]
        value = line["score.value"]
        if value >= target if higher else value <= target:
            return Cost(line["epoch"] + 1.0, seconds, sent)
    return None


def costs_of(group: Group, target: float) -> list[Cost]:
    """Of each run that reached the target."""
    return [cost for run in group.runs if (cost := first_reached(run, target))]


def target_row(group: Group, target: float) -> list[str]:
    """How many runs reached it, then epochs, seconds and megabytes of those that did."""
    costs = costs_of(group, target)
    return [
        f"{len(costs)} of {len(group.runs)}",
        with_spread([cost.epochs for cost in costs], 3),
        "-" if group.runs[0].simulated else with_spread([cost.seconds for cost in costs], 3),
        with_spread([cost.bytes / 1e6 for cost in costs], 3),
    ]


# --- tables ---------------------------------------------------------------------------------------


def build_sheets(section: Section, target: float | None) -> list[Sheet]:
    """What came out, what was sent, what a target score took, where the time went."""
    sheets = [scores_sheet(section)]
    if target is not None and any(group.done for group in section.groups):
        sheets.append(target_sheet(section, target))
    sheets += [bytes_sheet(section), time_sheet(section)]
    if section.is_numbered:
        sheets.append(key_sheet(section))
    return sheets


def scores_sheet(section: Section) -> Sheet:
    columns = ["run", "seeds", f"{section.score}\nlast", "\nbest"]
    rows = [[_name(group), *results_row(group)] for group in section.groups]
    return Sheet(f"Scores: {section.place}", columns, rows, SPREAD)


def target_sheet(section: Section, target: float) -> Sheet:
    """Of the finished groups."""
    columns = ["run", "reached\nby", "\nepochs", "trained\ns", "sent\nMB"]
    rows = [[_name(group), *target_row(group, target)] for group in section.groups if group.done]
    note = "of the seeds that reached it; evaluation is not counted"
    return Sheet(f"To a score ({section.score}) of {target:g}", columns, rows, note)


def bytes_sheet(section: Section) -> Sheet:
    columns = ["run", "density\nmean / target", "\np99", "sent\nMB", "\nto exact"]
    rows = [[_name(group), *bytes_row(group, exact_for(group, section.groups))] for group in section.groups]
    note = "sent: by one worker under the ring algorithm; to exact: per step"
    return Sheet("Density and bytes", columns, rows, note)


def time_sheet(section: Section) -> Sheet:
    times = ["compute\nms", "compression\nms", "communication\nms", "total\nms"]
    rows = [[_name(group), *time_row(group, exact_for(group, section.groups))] for group in section.groups]
    note = f"compute: {', '.join(COMPUTE)}; evaluation is not counted"
    if section.groups[0].runs[0].simulated:
        note += SIMULATED
    return Sheet("Time per step", ["run", *times, "speed\nto exact"], rows, note)


def key_sheet(section: Section) -> Sheet:
    """What the numbers stand for that take the place of long labels."""
    return Sheet("Runs", ["run", "settings"], [[group.name, group.label] for group in section.groups], "")


def _name(group: Group) -> str:
    """The first cell of a group's row."""
    return group.name if group.done else f"{group.name}\n{group.runs[0].progress}"


def to_terminal(sheet: Sheet) -> list[str | Table]:
    """What to print in turn. In 80 columns long texts are folded; numbers are never."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(sheet.columns):
        if i == 0 or name == "settings":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    return [sheet.title, table, f"{sheet.note}\n" if sheet.note else ""]


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
    """A row a configuration, with full precision; the settings that differ are columns of their own."""
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
        "place": section.place,
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
        **_spread_record("density", group.values(density_mean)),
        **_spread_record("p99", group.values(p99)),
        "target_density": target_density(group),
        "payload_bytes_per_step": fmean(per_step(run, "bytes.payload") for run in group.runs),
        "wire_bytes_per_step": sent_per_step(group),
        **{f"{phase}_ms": value for phase, value in milliseconds(group).items()},
    }


def _target_record(group: Group, target: float | None) -> Record:
    if target is None:
        return {}
    costs = costs_of(group, target)
    return {
        "reached": len(costs),
        **_spread_record(f"epochs_to_{target:g}", [cost.epochs for cost in costs]),
        **_spread_record(f"seconds_to_{target:g}", [cost.seconds for cost in costs]),
        **_spread_record(f"bytes_to_{target:g}", [cost.bytes for cost in costs]),
    }


def _spread_record(name: str, values: Sequence[float]) -> Record:
    mean, deviation = spread(values)
    return {f"{name}.mean": mean, f"{name}.std": deviation}
