"""The report's pictures: curves with a line for each configuration and a band over its seeds, and bars."""

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
from sage.report.tables import format_number, mean_milliseconds

MOST_PER_PICTURE = 8
"""Configurations in one picture: more lines in a panel cannot be told apart."""
LOG_FACTOR = 20
"""The axis of bytes is logarithmic where they differ by a larger factor."""
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
    """x, and over the seeds the mean, the least and the greatest y."""

    x: float
    mean: float
    least: float
    greatest: float


Curve = list[CurvePoint]


def draw(section: Section) -> list[Figure]:
    """Draw a section in one picture, or in several with about as many configurations each."""
    num_groups = len(section.groups)
    size = ceil(num_groups / ceil(num_groups / MOST_PER_PICTURE))
    return [_draw_page(section, start, size) for start in range(0, num_groups, size)]


def to_png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_page(section: Section, start: int, size: int) -> Figure:
    """Draw six panels (score over epochs, bytes and seconds; density, threshold, time) and a legend below."""
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
        return section.workload
    part = f"configurations {start + 1} to {start + num_drawn} of {len(section.groups)}"
    return f"{section.workload}, {part}"


# --- curves ---------------------------------------------------------------------------------------


def _over_total(count: Callable[[Flat], float]) -> Callable[[Run], Points]:
    """Make a function from a run to its score after each epoch, over the total of a count until then."""

    def points(run: Run) -> Points:
        return list(zip(accumulate(map(count, run.epochs)), score_values(run), strict=True))

    return points


def score_values(run: Run) -> list[float]:
    return [float(line["score.value"]) for line in run.epochs]


def _over_epochs(run: Run) -> Points:
    return [(line["epoch"] + 1.0, value) for line, value in zip(run.epochs, score_values(run), strict=True)]


@dataclass(frozen=True)
class ScoreAxis:
    """What a score is drawn over, in one panel."""

    what: str
    label: str
    points: Callable[[Run], Points]
    is_log_where_wide: bool = False
    """The axis is logarithmic where values differ by more than LOG_FACTOR."""


SCORE_AXES = (
    ScoreAxis("epochs", "training (epochs)", _over_epochs),
    ScoreAxis("bytes", "sent by one worker (MB)", _over_total(lambda line: line["bytes.wire"] / 1e6), True),
    ScoreAxis("seconds", "training without evaluation (s)", _over_total(training_seconds)),
)


def over_steps(run: Run, name: str) -> Points:
    """A run's (step, value) pairs; 0, which a log axis cannot show, is a gap; a dense run has no pairs."""
    values = [(line["step"], line[name] or nan) for line in run.steps if line.get(name) is not None]
    return values if name == "threshold" or any(value != 1 for _, value in values) else []


def average_curve(group: Group, of: Callable[[Run], Points]) -> Curve:
    """The curve over all seeds, as far as the shortest run; x is a mean too."""
    curve: Curve = []
    for points in zip(*map(of, group.runs), strict=False):  # a point of each seed
        xs, ys = zip(*points, strict=True)
        curve.append(CurvePoint(fmean(xs), fmean(ys), min(ys), max(ys)))
    return curve


def draw_scores(axes: Axes, groups: Sequence[Group], over: ScoreAxis, ylabel: str) -> None:
    """Draw the groups' scores over epochs, bytes or seconds."""
    curves = [average_curve(group, over.points) for group in groups]
    draw_lines(axes, curves, groups)
    if over.is_log_where_wide:
        choose_x_scale(axes, [point.x for points in curves for point in points])
    axes.set(title=f"Score over {over.what}", xlabel=over.label, ylabel=ylabel)


def choose_x_scale(axes: Axes, xs: Sequence[float]) -> None:
    """Make the x axis logarithmic where its values differ by more than LOG_FACTOR."""
    if xs and min(xs) > 0 and max(xs) > LOG_FACTOR * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())  # side by side they would overlap


def draw_targets(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw the target densities as broad grey lines, behind what is drawn later."""
    targets = {tuple(over_steps(group.runs[0], "target_density")) for group in groups} - {()}
    for target in sorted(targets):
        axes.plot(*zip(*target, strict=True), color="0.7", linewidth=4, label="target density")


def draw_over_steps(axes: Axes, groups: Sequence[Group], name: str) -> None:
    """Draw density or threshold on a log axis."""
    curves = [average_curve(group, lambda run: over_steps(run, name)) for group in groups]
    draw_lines(axes, curves, groups)
    axes.set(title=name.title(), xlabel="training (steps)", ylabel=f"{name} ({UNITS[name]})")
    if all(isnan(point.mean) for points in curves for point in points):
        return  # a log axis could show nothing
    axes.set_yscale("log")
    # Plain text, as 1e-02: the default is a formula, whose fonts may be missing.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))


def draw_lines(axes: Axes, curves: Sequence[Curve], groups: Sequence[Group]) -> None:
    """Draw one line for each group; an empty one too, so that a group looks the same in every panel."""
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
    number = f"{group.number} " if group.number is not None else ""
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return textwrap.fill(plain(f"{number}{group.label}{seeds}"), 36)


def plain(text: str) -> str:
    """A text from a run's files as matplotlib draws it letter by letter: a dollar sign starts no formula."""
    return printable(text).replace("$", r"\$")


# --- bars -----------------------------------------------------------------------------------------


def draw_times(axes: Axes, groups: Sequence[Group]) -> None:
    """Draw a bar for each group, the first on top: its phases, stacked, and at its end its length."""
    ends = [0.0] * len(groups)
    times = [mean_milliseconds(group) for group in groups]
    names = [textwrap.fill(plain(group.short_label), 16) for group in groups]
    for phase, (colour, hatch) in zip(times[0], FILLS, strict=True):
        widths = [time[phase] for time in times]
        axes.barh(names, widths, left=ends, color=colour, hatch=hatch, edgecolor="black", label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        axes.text(end, row, f" {format_number(end)}" if end else " no epoch done", va="center")
    axes.set(title="Time per step", xlabel="time per step (ms)", ylabel="run (reducer)")
    axes.set(xlim=(0, 1.15 * max(ends) or 1), ylim=(len(groups) - 0.5, -0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
