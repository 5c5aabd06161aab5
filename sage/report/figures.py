"""The report's pictures: curves and bars, a line a configuration, a band over its seeds."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, isnan, nan
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

from sage.console import printable
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
FILLS = (  # colour and hatch of each phase
    ("#eeeeee", "..."),
    ("#c6dbef", ""),
    ("#9ecae1", "//"),
    ("#eeeeee", "\\\\"),
    ("#fdae6b", "xx"),
    ("#555555", ""),
)
Points = list[tuple[float, float]]


class CurvePoint(NamedTuple):
    """x, and what y is there over the seeds."""

    x: float
    mean: float
    least: float
    greatest: float


Curve = list[CurvePoint]


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
    groups = section.groups[start : start + size]
    figure = Figure(figsize=(13, 12 + len(groups) / 4), dpi=110, layout="constrained")
    figure.suptitle(plain(_title(section, start, len(groups))))
    over_epochs, over_bytes, over_seconds, densities, thresholds, times = figure.subplots(3, 2).flat

    ylabel = f"{section.score} ({UNITS.get(section.score, 'no unit')})"
    for axes, score_axis in zip((over_epochs, over_bytes, over_seconds), SCORE_AXES, strict=True):
        draw_scores(axes, groups, score_axis, ylabel)
    draw_targets(densities, groups)
    draw_over_steps(densities, groups, "density")
    draw_over_steps(thresholds, groups, "threshold")
    draw_times(times, groups)

    lines = {line.get_label(): line for line in (*over_epochs.get_lines(), *densities.get_lines())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, handlelength=4)
    return figure


def _title(section: Section, start: int, num_drawn: int) -> str:
    if num_drawn == len(section.groups):
        return section.place
    part = f"configurations {start + 1} to {start + num_drawn} of {len(section.groups)}"
    return f"{section.place}, {part}"


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


@dataclass(frozen=True)
class ScoreAxis:
    """What a score is drawn over."""

    what: str
    label: str
    points: Callable[[Run], Points]
    is_log_where_wide: bool = False


SCORE_AXES = (
    ScoreAxis("epochs", "training (epochs)", _over_epochs),
    ScoreAxis("bytes", "sent by one worker (MB)", _over(lambda line: line["bytes.wire"] / 1e6), True),
    ScoreAxis("seconds", "training without evaluation (s)", _over(training_seconds)),
)


def over_steps(run: Run, name: str) -> Points:
    """(step, value) where there is one; a gap for 0, which a log axis cannot show; none for a dense run."""
    values = [(line["step"], line[name] or nan) for line in run.steps if line.get(name) is not None]
    return values if name == "threshold" or any(value != 1 for _, value in values) else []


def curve(group: Group, of: Callable[[Run], Points]) -> Curve:
    """As far as every seed came: the mean of x, and mean, least and greatest of y."""
    together: Curve = []
    for points in zip(*map(of, group.runs), strict=False):
        xs, ys = zip(*points, strict=True)
        together.append(CurvePoint(fmean(xs), fmean(ys), min(ys), max(ys)))
    return together


def draw_scores(axes: Axes, groups: Sequence[Group], over: ScoreAxis, ylabel: str) -> None:
    curves = [curve(group, over.points) for group in groups]
    draw_lines(axes, curves, groups)
    if over.is_log_where_wide:
        widen(axes, [point.x for points in curves for point in points])
    axes.set(title=f"Score over {over.what}", xlabel=over.label, ylabel=ylabel)


def widen(axes: Axes, xs: Sequence[float]) -> None:
    """A log axis of x where its values differ that much."""
    if xs and min(xs) > 0 and max(xs) > WIDE * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())  # side by side they would overlap


def draw_targets(axes: Axes, groups: Sequence[Group]) -> None:
    """The target densities, broad and grey, behind what is drawn later."""
    targets = {tuple(over_steps(group.runs[0], "target_density")) for group in groups} - {()}
    for target in sorted(targets):
        axes.plot(*zip(*target, strict=True), color="0.7", linewidth=4, label="target density")


def draw_over_steps(axes: Axes, groups: Sequence[Group], name: str) -> None:
    """Density or threshold on a log axis."""
    curves = [curve(group, lambda run: over_steps(run, name)) for group in groups]
    draw_lines(axes, curves, groups)
    axes.set(title=name.title(), xlabel="training (steps)", ylabel=f"{name} ({UNITS[name]})")
    if all(isnan(point.mean) for points in curves for point in points):
        return  # nothing that a log axis can show
    axes.set_yscale("log")
    # Plain text, 1e-02: the default is a formula, which asks for fonts that need not be there.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))


def draw_lines(axes: Axes, curves: Sequence[Curve], groups: Sequence[Group]) -> None:
    """One line a group, empty ones too, so that a group looks the same in every panel."""
    for i, (points, group) in enumerate(zip(curves, groups, strict=True)):
        xs, colour = [point.x for point in points], COLOURS[i % len(COLOURS)]
        (line,) = axes.plot(xs, [point.mean for point in points], label=_legend(group))
        line.set(color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)])
        every = max(1, len(points) // 8)
        line.set(markevery=(i * every // len(curves), every))
        if len(group.runs) > 1 and points:
            least, greatest = [point.least for point in points], [point.greatest for point in points]
            axes.fill_between(xs, least, greatest, color=colour, alpha=0.15, linewidth=0)
    if not any(curves):
        axes.text(0.5, 0.5, "none of the runs has one", ha="center", transform=axes.transAxes)
    axes.grid(color="0.9")


def _legend(group: Group) -> str:
    number = "" if group.name == group.label else f"{group.name.split(' ')[0]} "
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return textwrap.fill(plain(f"{number}{group.label}{seeds}"), 36)


def plain(text: str) -> str:
    """A text from a run's files as matplotlib draws it letter by letter: a dollar sign starts no formula."""
    return printable(text).replace("$", r"\$")


# --- bars -----------------------------------------------------------------------------------------


def draw_times(axes: Axes, groups: Sequence[Group]) -> None:
    """A bar a group, the first on top, stacked from the phases, with its length written at its end."""
    ends = [0.0] * len(groups)
    times = [milliseconds(group) for group in groups]
    names = [textwrap.fill(plain(group.name), 16) for group in groups]
    for phase, (colour, hatch) in zip(times[0], FILLS, strict=True):
        widths = [time[phase] for time in times]
        axes.barh(names, widths, left=ends, color=colour, hatch=hatch, edgecolor="black", label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        axes.text(end, row, f" {number(end)}" if end else " no epoch done", va="center")
    axes.set(title="Time per step", xlabel="time per step (ms)", ylabel="run (reducer)")
    axes.set(xlim=(0, 1.15 * max(ends) or 1), ylim=(len(groups) - 0.5, -0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
