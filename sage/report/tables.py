"""The report's tables: a row a configuration, in a terminal, in Markdown and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from sage.report.groups import Group, Section, exact_for
from sage.report.runs import COMPUTE, Run, density_mean, per_step, phases, spread, training_seconds

SPREAD = "± standard deviation over seeds"
SIMULATED = "\nsimulated: one worker's times, taken alone on the machine; communication has none"
Numbers = Callable[[Run], float | None]


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
    word = " less" if mine < exacts else " more" if mine > exacts else ""
    return f"{number(max(exacts / mine, mine / exacts))}x{word}"


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
    *compute, compression, communication = milliseconds(group).values()
    total = sum(compute) + compression + communication
    if not total:
        return ["-"] * 5
    if group.runs[0].simulated:
        return [*map(number, (sum(compute), compression)), "-", "-", "-"]
    speed = f"{number(sum(milliseconds(exact).values()) / total)}x" if exact else "-"
    return [*map(number, (sum(compute), compression, communication, total)), speed]


def first_reached(run: Run, target: float) -> tuple[float, float, float] | None:
    """Epochs, seconds and bytes sent until the score was first the target or better; None: never."""
    higher = run.summary.get("score.higher_is_better", True)
    seconds = sent = 0.0
    for line in run.epochs:
        seconds += training_seconds(line)
        sent += line["bytes.wire"]
        value = line["score.value"]
        if value >= target if higher else value <= target:
            return line["epoch"] + 1.0, seconds, sent
    return None


def target_row(group: Group, target: float) -> list[str]:
    """How many runs reached it, then epochs, seconds and megabytes of those that did."""
    reached = [found for run in group.runs if (found := first_reached(run, target))]
    epochs, seconds, sent = zip(*reached, strict=True) if reached else ((), (), ())
    if group.runs[0].simulated:
        seconds = ()
    told = [with_spread(values, 3) for values in (epochs, seconds, [size / 1e6 for size in sent])]
    return [f"{len(reached)} of {len(group.runs)}", *told]


# --- tables ---------------------------------------------------------------------------------------


def build_sheets(section: Section, target: float | None) -> list[Sheet]:
    """What came out, what was sent, what a target score took, where the time went."""
    groups, exacts = section.groups, [exact_for(group, section.groups) for group in section.groups]
    score, dense = section.score, "to exact: per step"
    is_simulated = groups[0].runs[0].simulated
    sheets = [
        _sheet(
            f"Scores: {section.place}",
            ["seeds", f"{score}\nlast", "\nbest"],
            groups,
            map(results_row, groups),
            SPREAD,
        ),
        _sheet(
            "Density and bytes",
            ["density\nmean / target", "\np99", "sent\nMB", "\nto exact"],
            groups,
            map(bytes_row, groups, exacts),
            f"sent: by one worker under the ring algorithm; {dense}",
        ),
        _sheet(
            "Time per step",
            ["compute\nms", "compression\nms", "communication\nms", "total\nms", "speed\nto exact"],
            groups,
            map(time_row, groups, exacts),
            f"compute: {', '.join(COMPUTE)}; evaluation is not counted" + SIMULATED * is_simulated,
        ),
    ]
    finished = [group for group in groups if group.done]
    if target is not None and finished:
        columns = ["reached\nby", "\nepochs", "trained\ns", "sent\nMB"]
        rows = [target_row(group, target) for group in finished]
        note = "of the seeds that reached it; evaluation is not counted"
        sheets.insert(1, _sheet(f"To a score ({score}) of {target:g}", columns, finished, rows, note))
    if section.is_numbered:
        rows = [[group.name, group.label] for group in groups]
        sheets.append(Sheet("Runs", ["run", "settings"], rows, ""))
    return sheets


def _sheet(title: str, columns: list[str], groups: Sequence[Group], rows: Any, note: str) -> Sheet:
    names = [group.name if group.done else f"{group.name}\n{group.runs[0].progress}" for group in groups]
    named = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return Sheet(title, ["run", *columns], named, note)


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
        return "| " + " | ".join(cell.strip().replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"

    rules = ["---"] + ["---:"] * (len(sheet.columns) - 1)
    lines = [f"### {sheet.title}", "", line(sheet.columns), line(rules), *map(line, sheet.rows)]
    return "\n".join([*lines, *(["", sheet.note] if sheet.note else [])]) + "\n"


# --- CSV ------------------------------------------------------------------------------------------


def to_csv(sections: Sequence[Section], target: float | None) -> str:
    """A row a configuration, with full precision; the settings that differ are columns of their own."""
    groups = [group for section in sections for group in section.groups]
    keys = sorted(set().union(*(group.runs[0].config for group in groups)) - {"seed"})
    differing = [key for key in keys if len({str(group.runs[0].config.get(key)) for group in groups}) > 1]
    file = io.StringIO()
    rows = [_record(section, group, differing, target) for section in sections for group in section.groups]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _record(section: Section, group: Group, keys: list[str], target: float | None) -> dict[str, Any]:
    config = group.runs[0].config
    record: dict[str, Any] = {"place": section.place, "run": group.label, "done": group.done}
    record |= {key: config.get(key) for key in keys}
    record |= {"seeds": " ".join(str(run.config.get("seed")) for run in group.runs), "score": section.score}
    numbers: dict[str, Numbers] = {
        "last": last_score,
        "best": best_score,
        "density": density_mean,
        "p99": p99,
    }
    for name, of in numbers.items():
        record[f"{name}.mean"], record[f"{name}.std"] = spread(group.values(of))
    record["target_density"] = target_density(group)
    for name in ("payload", "wire"):
        record[f"{name}_bytes_per_step"] = fmean(per_step(run, f"bytes.{name}") for run in group.runs)
    record |= {f"{phase}_ms": value for phase, value in milliseconds(group).items()}
    if target is not None:
        reached = [found for run in group.runs if (found := first_reached(run, target))]
        record["reached"] = len(reached)
        for i, name in enumerate(("epochs", "seconds", "bytes")):
            values = [found[i] for found in reached]
            record[f"{name}_to_{target:g}.mean"], record[f"{name}_to_{target:g}.std"] = spread(values)
    return record
