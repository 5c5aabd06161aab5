"""The report's pictures: curves and bars, a line a configuration, a band over its seeds."""

import io
import textwrap
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import ceil, isnan, nan
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

from sage.report.groups import Group, Section
from sage.report.runs import Flat, Run, training_seconds
from sage.report.tables import milliseconds, number

PAGE = 8
"""Configurations in a picture: more lines in a panel cannot be told apart."""
WIDE = 20
"""Where bytes differ by a larger factor, their axis is logarithmic."""
UNITS = {"accuracy": "fraction", "perplexity": "tokens", "density": "fraction", "threshold": "|gradient|"}
# Lines and bars differ in more than colour, so that they can be told apart in grey.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#007a55", "#aa4488")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^DvPX"
FILLS = ("#eeeeee ...", "#c6dbef ", "#9ecae1 //", "#eeeeee \\\\", "#fdae6b xx", "#555555 ")  # one a phase
Curve = list[tuple[float, float, float, float]]
"""x, then of y the mean, the least and the greatest over seeds."""
Points = list[tuple[float, float]]


def draw(section: Section) -> list[Figure]:
    """As many pictures as it takes for PAGE configurations at most in each, evenly."""
    num_groups = len(section.groups)
    size = ceil(num_groups / ceil(num_groups / PAGE))
    return [_draw_page(section, start, size) for start in range(0, num_groups, size)]


def to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_page(section: Section, start: int, size: int) -> Figure:
    """Panels: score over epochs, bytes and seconds, density, threshold, time; below them the legend."""
    groups, num_groups = section.groups[start : start + size], len(section.groups)
    figure = Figure(figsize=(13, 12 + len(groups) / 4), dpi=110, layout="constrained")
    part = f", configurations {start + 1} to {start + len(groups)} of {num_groups}"
    figure.suptitle(section.place + part * (len(groups) < num_groups))
    panels = list(figure.subplots(3, 2).flat)
    unit = UNITS.get(section.score, "no unit")
    for axes, (what, (xlabel, of)) in zip(panels, SCORES.items(), strict=False):
        curves = [curve(group, of) for group in groups]
        draw_lines(axes, curves, groups)
        if what == "bytes":
            widen(axes, [x for points in curves for x, *_ in points])
        axes.set(title=f"Score over {what}", xlabel=xlabel, ylabel=f"{section.score} ({unit})")
    for axes, name in zip(panels[3:], ("density", "threshold"), strict=False):
        draw_over_steps(axes, groups, name)
    draw_times(panels[5], groups)
    lines = {line.get_label(): line for line in (*panels[0].get_lines(), *panels[3].get_lines())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, handlelength=4)
    return figure


# --- curves ---------------------------------------------------------------------------------------


def _over(count: Callable[[Flat], float]) -> Callable[[Run], Points]:
    """The score after each epoch, over what had been counted until then."""

    def points(run: Run) -> Points:
        return list(zip(accumulate(map(count, run.epochs)), score_values(run), strict=True))

    return points


def score_values(run: Run) -> list[float]:
    return [float(line["score.value"]) for line in run.epochs]


def _over_epochs(run: Run) -> Points:
    return [(line["epoch"] + 1.0, value) for line, value in zip(run.epochs, score_values(run), strict=True)]


SCORES: dict[str, tuple[str, Callable[[Run], Points]]] = {
    "epochs": ("training (epochs)", _over_epochs),
    "bytes": ("sent by one worker (MB)", _over(lambda line: line["bytes.wire"] / 1e6)),
    "seconds": ("training without evaluation (s)", _over(training_seconds)),
}
"""What a score is drawn over: the axis, and a run's points."""


def over_steps(run: Run, name: str) -> Points:
    """(step, value) where there is one; a gap for 0, which a log axis cannot show; none for a dense run."""
    values = [(line["step"], line[name] or nan) for line in run.steps if line.get(name) is not None]
    return values if name == "threshold" or any(value != 1 for _, value in values) else []


def curve(group: Group, of: Callable[[Run], Points]) -> Curve:
    """As far as every seed came: the mean of x, and mean, least and greatest of y."""
    together: Curve = []
    for points in zip(*map(of, group.runs), strict=False):
        xs, ys = zip(*points, strict=True)
        together.append((fmean(xs), fmean(ys), min(ys), max(ys)))
    return together


def widen(axes: Axes, xs: Sequence[float]) -> None:
    """A log axis of x where its values differ that much."""
    if xs and min(xs) > 0 and max(xs) > WIDE * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())  # side by side they would overlap


def draw_over_steps(axes: Axes, groups: Sequence[Group], name: str) -> None:
    """Density or threshold on a log axis; behind the densities their targets."""
    targets = {tuple(over_steps(group.runs[0], "target_density")) for group in groups} - {()}
    for target in sorted(targets) if name == "density" else ():
        axes.plot(*zip(*target, strict=True), color="0.7", linewidth=4, label="target density")
    curves = [curve(group, lambda run: over_steps(run, name)) for group in groups]
    draw_lines(axes, curves, groups)
    axes.set(title=name.title(), xlabel="training (steps)", ylabel=f"{name} ({UNITS[name]})")
    if all(isnan(mean) for points in curves for _, mean, _, _ in points):
        return  # nothing that a log axis can show
    axes.set_yscale("log")
    # Plain text, 1e-02: the default is a formula, which asks for fonts that need not be there.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))


def draw_lines(axes: Axes, curves: Sequence[Curve], groups: Sequence[Group]) -> None:
    """One line a group, empty ones too, so that a group looks the same in every panel."""
    for i, (points, group) in enumerate(zip(curves, groups, strict=True)):
        xs, means, lows, highs = zip(*points, strict=True) if points else ((), (), (), ())
        every, colour = max(1, len(points) // 8), COLOURS[i % len(COLOURS)]
        (line,) = axes.plot(xs, means, label=_legend(group))
        line.set(color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)])
        line.set(markevery=(i * every // len(curves), every))
        if len(group.runs) > 1 and points:
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    if not any(curves):
        axes.text(0.5, 0.5, "none of the runs has one", ha="center", transform=axes.transAxes)
    axes.grid(color="0.9")


def _legend(group: Group) -> str:
    number = "" if group.name == group.label else f"{group.name.split(' ')[0]} "
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return textwrap.fill(f"{number}{group.label}{seeds}", 36)


# --- bars -----------------------------------------------------------------------------------------


def draw_times(axes: Axes, groups: Sequence[Group]) -> None:
    """A bar a group, the first on top, stacked from the phases, with its length written at its end."""
    ends = [0.0] * len(groups)
    times = [milliseconds(group) for group in groups]
    names = [textwrap.fill(group.name, 16) for group in groups]
    for phase, fill in zip(times[0], FILLS, strict=True):
        colour, hatch = fill.split(" ")
        widths = [time[phase] for time in times]
        axes.barh(names, widths, left=ends, color=colour, hatch=hatch, edgecolor="black", label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        axes.text(end, row, f" {number(end)}" if end else " no epoch done", va="center")
    axes.set(title="Time per step", xlabel="time per step (ms)", ylabel="run (reducer)")
    axes.set(xlim=(0, 1.15 * max(ends) or 1), ylim=(len(groups) - 0.5, -0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
