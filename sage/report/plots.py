"""The report's pictures for a page: the same lines, bands and bars as in figures.py, as plotly reads them.

A plot is what plotly calls a figure: a mapping of traces and a layout. Nothing is imported for it.
"""

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from typing import Any, TypeVar

from sage.console import printable
from sage.network import readable_speed
from sage.report.advice import (
    COMPARED_WITH,
    TICKS,
    WORKERS,
    Advice,
    SpeedLine,
    break_evens,
    over_speeds,
    over_workers,
    readable_tick,
)
from sage.report.advisor import BASELINES
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
from sage.report.groups import Group, Section
from sage.report.looks import (
    BOWTIE,
    DASH_DOTS,
    DIAMOND_STAR,
    FILLS,
    HEXAGRAM,
    HOURGLASS,
    LONG_DASHED,
    LONG_DOT,
    SQUARE_STAR,
    Dash,
    Look,
    Marker,
    Style,
    look_of,
    styles_of,
)
from sage.report.spread import BANDS, Band
from sage.report.tables import mean_milliseconds

Plot = dict[str, Any]
"""{"data": traces, "layout": ...}"""
Trace = dict[str, Any]
MOST_POINTS, FEWEST_POINTS, POINTS_OF_A_PANEL = 400, 40, 16_000
"""A curve keeps this many points: as many as a panel's share for it, within these limits."""
PANEL_HEIGHT, BAR_HEIGHT = 380, 26
"""In pixels."""
DASHES: dict[Dash, str] = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot", LONG_DASHED: "longdash"}
DASHES |= {LONG_DOT: "longdashdot", DASH_DOTS: "5px,2px,1px,2px,1px,2px"}
SYMBOLS: dict[Marker, str] = {
    "o": "circle",
    "^": "triangle-up",
    "s": "square",
    "D": "diamond",
    "P": "cross",
    "v": "triangle-down",
    "X": "x",
    "h": "hexagon",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "d": "diamond-tall",
    "8": "octagon",
    "H": "hexagon2",
    SQUARE_STAR: "star-square",
    DIAMOND_STAR: "star-diamond",
    HEXAGRAM: "hexagram",
    HOURGLASS: "hourglass",
    BOWTIE: "bowtie",
}
FILLINGS = {
    "full": ("", 7),
    "none": ("-open", 7),
    "left": ("-dot", 8),
    "bottom": ("-open-dot", 8),
    "right": ("", 11),
    "top": ("-open", 11),
}
"""What stands for a marker's filling, which plotly does not have: another form of it, and its size."""
PATTERNS = {"": "", ".": ".", "/": "/", "\\": "\\", "x": "x", "-": "-", "o": "+"}
"""A pattern for the first letter of a hatch."""


def escaped(text: str) -> str:
    """A text from a run's files in which plotly, which knows some of HTML, sees no markup."""
    return html.escape(printable(text), quote=False)


def folded(text: str, width: int = 36) -> str:
    """The text in lines, escaped."""
    return "<br>".join(map(escaped, textwrap.wrap(text, width)))


# --- lines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """What is drawn by one style in all panels, and hidden in all of them by its entry in the legend."""

    name: str
    style: Style


CROWD = 24
"""Configurations, of which more are thin lines without markers."""


def line_style(style: Style, is_crowded: bool = False) -> Trace:
    """How plotly draws a configuration, alone or among very many."""
    suffix, size = FILLINGS[style.filling]
    look = style.look
    if is_crowded:
        return {"mode": "lines", "line": {"color": look.colour, "dash": DASHES[look.dash], "width": 1}}
    return {
        "mode": "lines+markers",
        "line": {"color": look.colour, "dash": DASHES[look.dash], "width": style.line_width},
        "marker": {"symbol": SYMBOLS[look.marker] + suffix, "size": size, "maxdisplayed": 8},
    }


Point = TypeVar("Point")


def thinned(curve: list[Point], most: int) -> list[Point]:
    """As many points of a curve, evenly spaced, the first and the last among them."""
    if len(curve) <= most:
        return curve
    return [curve[round(index * (len(curve) - 1) / (most - 1))] for index in range(most)]


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Six digits, which are more than a screen shows; a gap is None."""
    return [float(f"{value:.6g}") if isfinite(value) else None for value in values]


def curve_traces(curves: Sequence[Curve], lines: Sequence[Named], panel: int) -> list[Trace]:
    """A panel's lines, and the bands around those of several seeds. The first panel's are the legend."""
    most = min(MOST_POINTS, max(FEWEST_POINTS, POINTS_OF_A_PANEL // max(1, len(curves))))
    traces = []
    for index, (whole, line) in enumerate(zip(curves, lines, strict=True)):
        curve, place = thinned(whole, most), _place(panel, index)
        if any(point.high > point.low for point in curve):
            traces.append(place | _band(curve, line.style.look))
        xs, ys = _rounded([point.x for point in curve]), _rounded([point.mean for point in curve])
        traces.append(
            place
            | line_style(line.style, len(lines) > CROWD)
            | {"x": xs, "y": ys, "name": line.name, "showlegend": panel == 1}
            | {"hovertemplate": "%{fullData.name}<br>%{x}: %{y}<extra></extra>"}
        )
    return traces


def _place(panel: int, index: int) -> Trace:
    """The panel of a trace, and what is hidden with it."""
    number = _number(panel)
    return {"type": "scatter", "xaxis": f"x{number}", "yaxis": f"y{number}", "legendgroup": str(index)}


def _band(curve: Curve, look: Look) -> Trace:
    points = [point for point in curve if isfinite(point.low) and isfinite(point.high)]
    xs, lows, highs = ([getattr(point, name) for point in points] for name in ("x", "low", "high"))
    red, green, blue = (int(look.colour[i : i + 2], 16) for i in (1, 3, 5))
    outline = {"x": _rounded(xs + xs[::-1]), "y": _rounded(highs + lows[::-1]), "mode": "lines"}
    paint = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.15)", "line": {"width": 0}}
    return outline | paint | {"hoverinfo": "skip", "showlegend": False}


# --- the picture of a section -----------------------------------------------------------------------


def curves_plot(section: Section, band: Band) -> Plot:
    """Score over epochs, bytes and seconds; density and threshold over steps. One legend hides a
    configuration everywhere."""
    groups = section.groups
    styles = styles_of([group.reducer for group in groups])
    lines = [Named(_name(group), style) for group, style in zip(groups, styles, strict=True)]
    layout, traces = _layout(rows=3, columns=2), []
    for panel, name in enumerate(PANELS, 1):
        curves, axes = PANELS[name](section, band)
        traces += _target_traces(section, panel) if name == "density" else []
        traces += curve_traces(curves, lines, panel)
        layout |= {f"{axis}axis{_number(panel)}": _axis(**given) for axis, given in axes.items()}
        layout["annotations"].append(_title(TITLES[name], panel))
    if any(len(group.runs) > 1 for group in groups):
        layout["legend"]["title"] = {"text": f"lines: means over seeds<br>bands: {folded(BANDS[band])}"}
    return {"data": traces, "layout": layout}


def _target_traces(section: Section, panel: int) -> list[Trace]:
    """The target densities, as broad grey lines."""
    looks = {"mode": "lines", "line": {"color": "#b3b3b3", "width": 4}, "name": "target density"}
    targets = (thinned(target, FEWEST_POINTS) for target in target_densities(section.groups))
    found = [list(zip(*target, strict=True)) for target in targets]
    return [
        _place(panel, -1) | looks | {"x": _rounded(xs), "y": _rounded(ys), "showlegend": not index}
        for index, (xs, ys) in enumerate(found)
    ]


Axes = dict[str, dict[str, Any]]
"""What there is to say of the axes x and y of a panel."""


def _score_panel(over: str) -> Callable[[Section, Band], tuple[list[Curve], Axes]]:
    def panel(section: Section, band: Band) -> tuple[list[Curve], Axes]:
        axis = SCORE_AXES[over]
        curves = [average_curve(group, axis.points, band) for group in section.groups]
        is_log = axis.is_log_where_wide and is_wide([point.x for points in curves for point in points])
        score = escaped(with_unit(section.score))
        return curves, {"x": {"title": axis.label, "is_log": is_log}, "y": {"title": score}}

    return panel


def _steps_panel(name: str) -> Callable[[Section, Band], tuple[list[Curve], Axes]]:
    def panel(section: Section, band: Band) -> tuple[list[Curve], Axes]:
        curves = [average_curve(group, lambda run: over_steps(run, name), band) for group in section.groups]
        targets = target_densities(section.groups) if name == "density" and any(curves) else []
        limits = log_limits([*curves, *map(as_curve, targets)])
        if limits and limits.low is not None and limits.high is not None:
            floor, ends = limits.low, [log10(limits.low), log10(limits.high)]
            curves = [[point._replace(low=max(point.low, floor)) for point in points] for points in curves]
        else:
            ends = None
        y = {"title": with_unit(name), "is_log": limits is not None, "ends": ends}
        return curves, {"x": {"title": "training (steps)"}, "y": y}

    return panel


PANELS: Mapping[str, Callable[[Section, Band], tuple[list[Curve], Axes]]] = {
    **{name: _score_panel(name) for name in SCORE_AXES},
    **{name: _steps_panel(name) for name in ("density", "threshold")},
}


def _name(group: Group) -> str:
    number = f"{group.number} " if group.number is not None else ""
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return folded(f"{number}{group.label}{seeds}")


# --- layout ---------------------------------------------------------------------------------------


def _layout(rows: int, columns: int) -> dict[str, Any]:
    return {
        "grid": {"rows": rows, "columns": columns, "pattern": "independent", "ygap": 0.3, "xgap": 0.15},
        "height": PANEL_HEIGHT * rows,
        "margin": {"t": 40, "r": 10, "b": 50, "l": 70},
        "legend": {"groupclick": "togglegroup"},
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "plot_bgcolor": "#ffffff",
        "annotations": [],
    }


def _axis(title: str, is_log: bool = False, ends: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """ends: of a log axis, powers of ten."""
    axis = {"title": {"text": title}, "gridcolor": "#e5e5e5", "zeroline": False, "showline": True} | more
    axis |= {"linecolor": "#444444"}
    axis |= {"type": "log", "tickformat": "~g", "nticks": 5} if is_log else {}
    return axis | ({"range": ends, "dtick": "D2"} if ends else {})


def _number(panel: int) -> str:
    """What follows x or y in the name of a panel's axis."""
    return "" if panel == 1 else str(panel)


def _title(text: str, panel: int) -> dict[str, Any]:
    number = _number(panel)
    place = {"xref": f"x{number} domain", "yref": f"y{number} domain", "x": 0.5, "y": 1.0}
    return {"text": text, "showarrow": False, "yanchor": "bottom", "font": {"size": 15}} | place


# --- bars -----------------------------------------------------------------------------------------


def times_plot(section: Section) -> Plot:
    """A bar for each configuration, the first on top: its phases, stacked. The legend hides phases."""
    times = [mean_milliseconds(group) for group in section.groups]
    names = [folded(group.short_label, 24) for group in section.groups]
    traces = []
    for phase, (colour, hatch) in FILLS.items():
        if any(time[phase] for time in times):
            pattern = {"shape": PATTERNS[hatch[:1]], "fgcolor": "#000000", "size": 7}
            marker = {"color": colour, "pattern": pattern, "line": {"color": "#000000", "width": 1}}
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "y": names,
                    "x": _rounded([time[phase] for time in times]),
                }
                | {"name": phase, "marker": marker}
                | {"hovertemplate": "%{y}<br>" + phase + ": %{x} ms<extra></extra>"}
            )
    layout = _layout(1, 1) | {"barmode": "stack", "height": 150 + BAR_HEIGHT * len(names)}
    layout["legend"] = {"traceorder": "normal"}
    layout["xaxis"] = _axis("time per step (ms); agree and log: the harness's own")
    layout["yaxis"] = _axis("", type="category", autorange="reversed", automargin=True)
    return {"data": traces, "layout": layout}


# --- other networks ---------------------------------------------------------------------------------


def advice_plot(advice: Advice) -> Plot:
    """How many steps each method makes while the average compared with makes one: over links, with the
    break-even marked, and over workers."""
    speeds, workers = over_speeds(advice), over_workers(advice)
    layout = _layout(rows=1, columns=2) | {"height": PANEL_HEIGHT + 60}
    traces = [
        *_speed_traces(*speeds, panel=1),
        *_break_even_traces(advice),
        *_speed_traces(*workers, panel=2),
    ]
    latency = f"{1e6 * advice.link.latency_seconds:g} µs a message"
    for panel, title in enumerate((f"{advice.title}, {latency}", advice.network), 1):
        layout["annotations"].append(_title(escaped(title), panel))
        layout[f"yaxis{_number(panel)}"] = _axis(f"times as fast as exact {COMPARED_WITH.name}", is_log=True)
    names = list(map(readable_tick, TICKS))
    layout["xaxis"] = _axis("link (bit/s)", is_log=True, tickvals=TICKS, ticktext=names)
    layout["xaxis2"] = _axis("workers", is_log=True, tickvals=WORKERS, ticktext=list(map(str, WORKERS)))
    layout["legend"]["title"] = {"text": "predicted; x: break-even"}
    return {"data": traces, "layout": layout}


def _speed_traces(xs: Sequence[float], lines: Sequence[SpeedLine], panel: int) -> list[Trace]:
    return [
        _place(panel, index)
        | line_style(line.style)
        | {
            "x": _rounded(xs),
            "y": _rounded(line.ratios),
            "name": folded(line.label),
            "showlegend": panel == 1,
        }
        | {"hovertemplate": "%{fullData.name}<br>%{x}: %{y}<extra></extra>"}
        for index, line in enumerate(lines)
    ]


def _break_even_traces(advice: Advice) -> list[Trace]:
    """A mark on each method's line, which is hidden with it; its speed is said where the pointer is on it."""
    first = len(BASELINES) - 1  # the lines of the other exact averages come first
    places = {group.label: str(index) for index, (group, _) in enumerate(advice.methods, first)}
    return [
        {"type": "scatter", "x": [speed], "y": [1], "mode": "markers", "showlegend": False}
        | {"marker": {"symbol": "x-thin-open", "size": 12, "color": look_of(group.reducer).colour}}
        | {"legendgroup": places[group.label]}
        | {"hovertemplate": f"{escaped(group.label)}<br>break-even: {readable_speed(speed)}<extra></extra>"}
        for group, speed in break_evens(advice)
    ]
