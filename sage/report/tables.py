"""The report's tables, with a row for each configuration: what their cells say."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from sage.report.groups import Group, Section, find_baseline, find_exact
from sage.report.runs import (
    COMPUTE,
    Run,
    mean_density,
    per_step,
    phase_milliseconds,
    training_seconds,
    unaccounted_milliseconds,
)
from sage.report.spread import BANDS, Band, Difference, Spread, paired_difference

HIDDEN = (
    "\noverlap: compression and communication are what backward leaves to wait for; hidden: the exchange "
    "meanwhile"
)
SIMULATED = "\nsimulated: one worker's times, measured while no other ran; communication was not timed"


@dataclass(frozen=True)
class Sheet:
    """A table before it is printed or written. The first column is text, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str


# --- numbers as text ------------------------------------------------------------------------------


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with as many significant digits, zeros too: 0.970, 52.1, 1,234; '-' for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def format_spread(values: Sequence[float], digits: int, band: Band = "std") -> str:
    """Format mean and spread: '0.9700 ±0.0012'; of a single value the mean alone."""
    mean, width = Spread.of(values, band)
    return format_number(mean, digits) + ("" if width is None else f" ±{format_number(width, 2)}")


def format_signed(value: float) -> str:
    """Format a difference: '+0.00120', '-0.0150'; of zero there is no sign."""
    return f"{'+' if value > 0 else ''}{format_number(value)}"


def format_ratio(mine: float, exact: float) -> str:
    """Format how much less or more than exact it is: '50.0x less'; '-' where either is 0."""
    if not mine or not exact:
        return "-"
    if mine < exact:
        return f"{format_number(exact / mine)}x less"
    return f"{format_number(mine / exact)}x{' more' if mine > exact else ''}"


# --- a group's rows -------------------------------------------------------------------------------


def last_score(run: Run) -> float | None:
    value = run.summary.get("score.last", run.epochs[-1]["score.value"] if run.epochs else None)
    return None if value is None else float(value)


def best_score(run: Run) -> float | None:
    return run.summary.get("score.best")


def p99_density(run: Run) -> float | None:
    return run.summary.get("density.p99")


def target_density(group: Group) -> float | None:
    """The density that the reducer aims at; None for a dense reducer, and before the first step line."""
    steps = group.runs[0].steps
    return steps[-1].get("target_density") if steps else None


def bytes_sent_per_step(group: Group) -> float:
    """The bytes that one worker sends in a step, the mean over seeds."""
    return fmean(per_step(run, "bytes.wire") for run in group.runs)


def mean_milliseconds(group: Group) -> dict[str, float]:
    """Milliseconds per step of each phase, the mean over seeds."""
    times = [phase_milliseconds(run) for run in group.runs]
    return {phase: fmean(time[phase] for time in times) for phase in times[0]}


def results_row(group: Group, band: Band = "std") -> list[str]:
    """The cells: how many seeds, the last score and the best."""
    last, best = group.values(last_score), group.values(best_score)
    return [str(len(group.runs)), format_spread(last, 4, band), format_spread(best, 4, band)]


def bytes_row(group: Group, exact: Group | None, band: Band = "std") -> list[str]:
    """The cells: mean and target density, its p99, megabytes sent, and bytes per step compared with exact."""
    density, target = format_spread(group.values(mean_density), 3, band), target_density(group)
    p99 = Spread.of(group.values(p99_density)).mean
    megabytes = fmean(sum(line["bytes.wire"] for line in run.epochs) for run in group.runs) / 1e6
    return [
        f"{density} / {target:g}" if target else density,
        format_number(p99),
        format_number(megabytes, 4),
        format_ratio(bytes_sent_per_step(group), bytes_sent_per_step(exact)) if exact else "-",
    ]


def step_milliseconds(group: Group) -> float:
    """Milliseconds of a step: all phases but the harness's own; 0 where none was timed."""
    times = mean_milliseconds(group)
    return sum(times[phase] for phase in (*COMPUTE, "compression", "communication"))


def has_phase(group: Group, name: str) -> bool:
    """Whether the runs were timed by this phase: those of an earlier version were not by all."""
    return any(f"seconds.{name}" in line for run in group.runs for line in run.epochs)


def time_row(group: Group, exact: Group | None) -> list[str]:
    """The cells: milliseconds per step, how many steps are made while exact makes one, and what the harness
    itself takes: agree, log, and what is in no phase."""
    times, step = mean_milliseconds(group), step_milliseconds(group)
    if not step:
        return ["-"] * 8
    compute = sum(times[phase] for phase in COMPUTE)
    computed = [format_number(compute), format_number(times["compression"])]
    if group.runs[0].simulated:
        return [*computed, *["-"] * 6]
    rest = Spread.of(group.values(unaccounted_milliseconds)).mean
    return [
        *computed,
        format_number(times["communication"]),
        format_number(step),
        f"{format_number(step_milliseconds(exact) / step)}x" if exact else "-",
        format_number(times["agree"]) if has_phase(group, "agree") else "-",
        format_number(times["log"]) if has_phase(group, "log") else "-",
        format_number(rest),
    ]


# --- seed by seed -----------------------------------------------------------------------------------


def scores_by_seed(group: Group) -> dict[int, float]:
    """The last scores of a finished group by seed."""
    scores = ((run.config.get("seed"), last_score(run)) for run in group.runs if group.done)
    return {seed: score for seed, score in scores if seed is not None and score is not None}


def find_difference(group: Group, baseline: Group | None) -> Difference | None:
    """How much larger the last score is than a baseline's; None where no seed has both."""
    if baseline is None or baseline is group:
        return None
    return paired_difference(scores_by_seed(group), scores_by_seed(baseline))


def difference_row(difference: Difference) -> list[str]:
    """The cells: how many seeds both have, the mean difference, and its interval."""
    mean, half_width = difference.mean, difference.half_width
    if half_width is None:
        return [str(difference.num_pairs), format_signed(mean), "-"]
    interval = f"{format_signed(mean - half_width)} to {format_signed(mean + half_width)}"
    return [str(difference.num_pairs), format_signed(mean), interval]


# --- what a score took ------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What it took one worker to reach a score; bytes are those it sent."""

    epochs: float
    seconds: float
    bytes: float


def cost_to_reach(run: Run, target: float) -> Cost | None:
    """What it took until the score was first the target or better; None where it never was."""
    higher = run.summary.get("score.higher_is_better", True)
    seconds = sent = 0.0
    for line in run.epochs:
        seconds += training_seconds(line)
        sent += line["bytes.wire"]
        value = line["score.value"]
        if value >= target if higher else value <= target:
            return Cost(line["epoch"] + 1.0, seconds, sent)
    return None


def costs_to_reach(group: Group, target: float) -> list[Cost]:
    """The costs of those runs that reached the target."""
    return [cost for run in group.runs if (cost := cost_to_reach(run, target))]


def target_row(group: Group, target: float, band: Band = "std") -> list[str]:
    """The cells: how many runs reached the target, and the epochs, seconds and megabytes it took them."""
    costs = costs_to_reach(group, target)
    return [
        f"{len(costs)} of {len(group.runs)}",
        format_spread([cost.epochs for cost in costs], 3, band),
        "-" if group.runs[0].simulated else format_spread([cost.seconds for cost in costs], 3, band),
        format_spread([cost.bytes / 1e6 for cost in costs], 3, band),
    ]


# --- tables ---------------------------------------------------------------------------------------


def build_sheets(
    section: Section, target: float | None, band: Band = "std", baseline: str | None = None
) -> list[Sheet]:
    """Build a section's tables: scores, their differences from a baseline, what a target took, density and
    bytes, times, labels by number.

    baseline: the name of a configuration or reducer; None: the exact average.
    """
    sheets = [scores_sheet(section, band)]
    if differences := differences_sheet(section, baseline):
        sheets.append(differences)
    if target is not None and any(group.done for group in section.groups):
        sheets.append(target_sheet(section, target, band))
    sheets += [bytes_sheet(section, band), time_sheet(section)]
    if section.is_numbered:
        sheets.append(key_sheet(section))
    return sheets


def scores_sheet(section: Section, band: Band = "std") -> Sheet:
    columns = ["run", "seeds", f"{section.score}\nlast", f"{section.score}\nbest"]
    rows = [[_first_cell(group), *results_row(group, band)] for group in section.groups]
    return Sheet(f"Scores: {section.workload}", columns, rows, spread_note(section, band))


def spread_note(section: Section, band: Band) -> str:
    """What follows the sign ± in a section's tables; empty where every configuration has one seed."""
    return BANDS[band] if any(len(group.runs) > 1 for group in section.groups) else ""


def differences_sheet(section: Section, baseline: str | None = None) -> Sheet | None:
    """What each configuration scores more or less than its baseline; None where no seed can be compared."""
    columns = ["run", "paired\nseeds", f"{section.score}\ndifference", "95 % interval\nof the mean"]
    rows, names = [], []
    for group in section.groups:
        compared = find_baseline(group, section.groups, baseline)
        if compared and (difference := find_difference(group, compared)):
            rows.append([_first_cell(group), *difference_row(difference)])
            names.append(compared.short_label)
    if not rows:
        return None
    note = "last score less the baseline's with the same seed, the mean over seeds; Student's t"
    return Sheet(f"Compared with {' or '.join(dict.fromkeys(names))}, seed by seed", columns, rows, note)


def target_sheet(section: Section, target: float, band: Band = "std") -> Sheet:
    """What it took to reach a score; unfinished groups are left out."""
    columns = ["run", "reached\nby", "\nepochs", "trained\ns", "sent\nMB"]
    rows = [[_first_cell(group), *target_row(group, target, band)] for group in section.groups if group.done]
    spread = spread_note(section, band)
    note = f"{spread}, of those that reached it\n" if spread else ""
    note += "trained: steps, without evaluation, agree and log"
    return Sheet(f"To a score ({section.score}) of {target:g}", columns, rows, note)


def bytes_sheet(section: Section, band: Band = "std") -> Sheet:
    columns = ["run", "density\nmean / target", "\np99", "sent\nMB", "\nto exact"]
    rows = [
        [_first_cell(group), *bytes_row(group, find_exact(group, section.groups), band)]
        for group in section.groups
    ]
    note = "sent: by one worker under the ring algorithm; to exact: per step"
    return Sheet("Density and bytes", columns, rows, note)


def hidden_cell(group: Group) -> str:
    """Milliseconds per step of the exchange while backward computed."""
    if not has_phase(group, "hidden"):
        return "-"
    return format_number(1000 * fmean(per_step(run, "seconds.hidden") for run in group.runs))


def time_sheet(section: Section) -> Sheet:
    times = ["compute\nms", "compression\nms", "communication\nms", "step\nms", "speed\nto exact"]
    harness = ["agree\nms", "log\nms", "other\nms"]
    rows = [
        [_first_cell(group), *time_row(group, find_exact(group, section.groups))] for group in section.groups
    ]
    if any(has_phase(group, "hidden") for group in section.groups):
        harness.append("hidden\nms")
        rows = [[*row, hidden_cell(group)] for row, group in zip(rows, section.groups, strict=True)]
    note = (
        f"compute: {', '.join(COMPUTE)}\n"
        "step, speed: without the harness's own agree, log and other\n"
        "other: wall time in no phase; evaluation and checkpoints are not counted"
    )
    if "hidden\nms" in harness:
        note += HIDDEN
    if section.groups[0].runs[0].simulated:
        note += SIMULATED
    return Sheet("Time per step", ["run", *times, *harness], rows, note)


def key_sheet(section: Section) -> Sheet:
    """The labels of the groups that the other tables number."""
    return Sheet(
        "Runs", ["run", "settings"], [[group.short_label, group.label] for group in section.groups], ""
    )


def _first_cell(group: Group) -> str:
    """A group's cell in the column `run`: its label and, where it is unfinished, how far it came."""
    return group.short_label if group.done else f"{group.short_label}\n{group.runs[0].progress}"
