"""The report's pictures: curves with a line for each configuration and a band over its seeds, and bars."""

import io
import textwrap
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullLocator

from sage.console import printable
from sage.report.curves import (
    SCORE_AXES,
    TITLES,
    Curve,
    as_curve,
    average_curve,
    is_wide,
    log_limits,
    over_steps,
    target_densities,
    with_unit,
)
from sage.report.groups import LONGEST_LABEL, Group
from sage.report.looks import FILLS, Style
from sage.report.pictures import Page
from sage.report.tables import format_number, mean_milliseconds

LEGEND_COLUMNS = 3
LINE, LETTER = 0.2, 0.085
"""The height of a line and the width of a letter, in inches."""
LINE_SPACING = 1.2
"""The distance of two lines of text, in their font's size, as matplotlib has it."""
PANEL_HEIGHT, BETWEEN, ABOVE = 3.0, 0.85, 0.65
"""Of a panel, between panels, and above them; in inches."""
SETTINGS: Any = {  # of a file: fonts as journals ask for, and the same bytes in every run
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "sage",
}
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""The metadata of each kind of file: no date."""


def to_file(figure: Figure, kind: str) -> bytes:
    """The bytes of a file of a kind: png, pdf or svg."""
    file = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        quick: Any = {"pil_kwargs": {"compress_level": 3}} if kind == "png" else {}  # a third of the time
        figure.savefig(file, format=kind, metadata=UNDATED[kind], **quick)
    return file.getvalue()


def draw(page: Page) -> Figure:
    """Draw all panels (score over epochs, bytes and seconds; density, threshold, time) and a legend below.

    Their places are worked out here, in inches, and so are those of titles and labels: matplotlib's own
    layout takes twice the time.
    """
    labels = [_legend(group) for group in page.groups]
    names = [_bar_name(group) for group in page.groups]
    rows = ceil((len(labels) + 1) / LEGEND_COLUMNS)  # one more for the target density
    legend = LINE * (rows * max(label.count("\n") + 1 for label in labels) + 2)
    below = legend + 6.5 * LINE  # the axis of the bars, and their legend
    left, middle = 0.95, 0.75 + LETTER * max(len(line) for name in names for line in name.splitlines())
    width, height = 13.0, below + 3 * PANEL_HEIGHT + 2 * BETWEEN + ABOVE

    figure = Figure(figsize=(width, height), dpi=110)
    panel_width = (width - left - middle - 0.25) / 2
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.25 / width,
        bottom=below / height,
        top=1 - ABOVE / height,
        wspace=middle / panel_width,
        hspace=BETWEEN / PANEL_HEIGHT,
    )
    figure.suptitle(plain(page.title), y=1 - 0.15 / height, va="top")
    for axes, (name, draw_panel) in zip(figure.subplots(3, 2).flat, PANELS.items(), strict=True):
        draw_panel(axes, page)
        axes.set_title(TITLES[name], y=1)
        limit_ticks(axes)
        if name != "time":
            place_labels(axes, panel_width)
    _add_legend(figure, page, loc="lower center", ncols=LEGEND_COLUMNS)
    return figure


def place_labels(axes: Axes, width: float) -> None:
    """Place the labels of a panel (width inches) beside its ticks; by itself each would measure all of them,
    at every drawing."""
    axes.xaxis.set_label_coords(0.5, -0.28 / PANEL_HEIGHT)
    axes.yaxis.set_label_coords(-0.63 / width, 0.5)


def draw_single(page: Page, name: str) -> Figure:
    """Draw one panel, at the size of a column in a paper, without a title."""
    height = 3.4 + len(page.groups) / 5
    figure = Figure(figsize=(4.8, height), dpi=220, layout="constrained")
    axes = figure.subplots()
    PANELS[name](axes, page)
    limit_ticks(axes)
    if name != "time":
        _add_legend(figure, page, loc="outside lower center", ncols=1)
    return figure


def _add_legend(figure: Figure, page: Page, loc: Any, ncols: int) -> None:
    """Add a legend of all lines, each once, under a title that says what lines and bands are."""
    lines = {
        str(line.get_label()): line
        for axes in figure.axes
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }
    title = textwrap.fill(page.caption, 50 * ncols) or None
    figure.legend(lines.values(), lines.keys(), loc=loc, ncols=ncols, handlelength=4, title=title)


# --- curves ---------------------------------------------------------------------------------------


def draw_scores(axes: Axes, page: Page, over: str) -> None:
    """Draw the groups' scores over epochs, bytes or seconds."""
    axis = SCORE_AXES[over]
    curves = [average_curve(group, axis.points, page.band) for group in page.groups]
    draw_lines(axes, curves, page)
    if axis.is_whole and any(curves):
        tick_whole_numbers(axes)
    if axis.is_log_where_wide:
        choose_x_scale(axes, [point.x for points in curves for point in points])
    axes.set(xlabel=axis.label, ylabel=with_unit(page.score))


def choose_x_scale(axes: Axes, xs: Sequence[float]) -> None:
    """Make the x axis logarithmic where its values differ by more than LOG_FACTOR."""
    if is_wide(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_locator(NullLocator())


def draw_density(axes: Axes, page: Page) -> None:
    """Draw the target densities as broad grey lines, and over them the densities."""
    targets = target_densities(page.groups)
    for target in targets:
        axes.plot(*zip(*target, strict=True), color="0.7", linewidth=4, label="target density")
    draw_over_steps(axes, page, "density", others=list(map(as_curve, targets)))


def draw_over_steps(axes: Axes, page: Page, name: str, others: Sequence[Curve] = ()) -> None:
    """Draw density or threshold on a log axis, which shows other curves too."""
    curves = [average_curve(group, lambda run: over_steps(run, name), page.band) for group in page.groups]
    draw_lines(axes, curves, page)
    axes.set(xlabel="training (steps)", ylabel=with_unit(name))
    if not any(curves):
        return
    tick_whole_numbers(axes)
    limits = log_limits([*curves, *others])
    if limits is None:
        return
    axes.set_yscale("log")
    if limits.low is not None:
        axes.set_ylim(*limits)
    # Plain text, as 0.01: the default is a formula, whose fonts may be missing.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    bottom, top = axes.get_ylim()
    if top < 100 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())  # half of the time of drawing are ticks


def tick_whole_numbers(axes: Axes) -> None:
    """Let only whole numbers have a tick on the x axis, at most six."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def limit_ticks(axes: Axes) -> None:
    """Show at most six numbers on a linear axis: ticks take a third of the time of drawing."""
    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(axis.get_major_locator(), AutoLocator):
            axis.set_major_locator(MaxNLocator(5))


def draw_lines(axes: Axes, curves: Sequence[Curve], page: Page) -> None:
    """Draw one line for each group; an empty one too, so that each is in the legend."""
    for i, (points, group, style) in enumerate(zip(curves, page.groups, page.styles, strict=True)):
        xs = [point.x for point in points]
        (line,) = axes.plot(xs, [point.mean for point in points], label=_legend(group))
        wear(line, style)
        every = max(1, len(points) // 8)
        line.set(markevery=(i * every // len(curves), every))
        if len(group.runs) > 1 and points:
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(xs, low, high, color=style.look.colour, alpha=0.15, linewidth=0)
    if not any(curves):
        axes.text(0.5, 0.5, "none of the runs has one", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    axes.grid(color="0.9")


def wear(line: Line2D, style: Style) -> None:
    """Give a line its configuration's style."""
    look = style.look
    line.set(color=look.colour, marker=look.marker, linestyle=look.dash, linewidth=style.line_width)
    line.set(markersize=7, fillstyle=style.filling, markerfacecoloralt="white")


def _legend(group: Group) -> str:
    number = f"{group.number} " if group.number is not None else ""
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return textwrap.fill(plain(f"{number}{group.label}{seeds}"), 36)


def plain(text: str) -> str:
    """A text from a run's files as matplotlib draws it letter by letter: a dollar sign starts no formula."""
    return printable(text).replace("$", r"\$")


# --- bars -----------------------------------------------------------------------------------------


def draw_times(axes: Axes, page: Page) -> None:
    """Draw a bar for each group, the first on top: its phases, stacked, and at its end its length."""
    rows, ends = range(len(page.groups)), [0.0] * len(page.groups)
    times = [mean_milliseconds(group) for group in page.groups]
    names = [_bar_name(group) for group in page.groups]
    for phase in [name for name in FILLS if any(time[name] for time in times)]:
        (colour, hatch), widths = FILLS[phase], [time[phase] for time in times]
        axes.barh(rows, widths, left=ends, color=colour, hatch=hatch, edgecolor="black", label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    size = bar_font_size(axes, sum(name.count("\n") + 1 for name in names))
    for row, end in enumerate(ends):
        text = f" {format_number(end)}" if end else " no epoch done"
        axes.text(end, row, text, va="center", fontsize=size)
    axes.set(xlabel="time per step (ms); agree and log: the harness's own", ylabel="run (reducer)")
    axes.set(xlim=(0, 1.15 * max(ends) or 1), ylim=(len(page.groups) - 0.5, -0.5))
    axes.set_yticks(rows, names, fontsize=size)
    if any(ends):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)


def bar_font_size(axes: Axes, num_lines: int) -> float:
    """The size, in points, at which so many lines of text fit beside the bars; 10 where they are few."""
    height = axes.get_position().height * axes.get_figure().get_figheight()  # type: ignore[union-attr]
    return min(10.0, 72 * height / (LINE_SPACING * num_lines))


def _bar_name(group: Group) -> str:
    return textwrap.fill(plain(group.short_label), LONGEST_LABEL)  # a line each: there may be many bars


PANELS: dict[str, Callable[[Axes, Page], None]] = {
    "epochs": lambda axes, page: draw_scores(axes, page, "epochs"),
    "bytes": lambda axes, page: draw_scores(axes, page, "bytes"),
    "seconds": lambda axes, page: draw_scores(axes, page, "seconds"),
    "density": draw_density,
    "threshold": lambda axes, page: draw_over_steps(axes, page, "threshold"),
    "time": draw_times,
}
