"""What the advisor says of a section: tables for one network, and a picture over networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING

from sage.network import Link, exact_calls, readable_speed, wire_bytes
from sage.report.advisor import (
    BASELINES,
    Baseline,
    Method,
    Workload,
    break_even_speed,
    exact_step_seconds,
    methods_of,
    step_seconds,
    workload_of,
)
from sage.report.groups import Group, Section, exactness
from sage.report.looks import Style, look_of, styles_of
from sage.report.runs import ReportError
from sage.report.tables import Sheet, bytes_sent_per_step, costs_to_reach, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST_SPEED, LAST_SPEED = 10e6, 400e9
"""Bits per second that the picture covers."""
WORKERS = tuple(2**power for power in range(1, 11))
"""How many workers the picture covers."""
COMPARED_WITH = BASELINES[3]
"""What the picture compares with: what torch's own hook gives at no cost (Agarwal et al. 2024, arXiv
2407.01378, ask for a 16-bit baseline)."""


@dataclass(frozen=True)
class Network:
    """What the user asks about."""

    link: Link
    world_size: int | None = None
    """None: as many workers as the runs had."""
    compute_seconds: float | None = None
    """Of a step, in place of what was measured."""


@dataclass(frozen=True)
class Advice:
    """What is known of a section, for one network."""

    section: Section
    workload: Workload
    methods: list[tuple[Group, Method]]
    link: Link
    world_size: int

    @property
    def title(self) -> str:
        task = self.section.workload.split(",")[0]
        return f"{task}, {self.world_size} workers"

    @property
    def network(self) -> str:
        latency = f"{1e6 * self.link.latency_seconds:g} µs a message"
        return f"{readable_speed(self.link.bits_per_second)}, {latency}"


def advise(sections: Sequence[Section], network: Network) -> dict[str, Advice]:
    """What can be said of sections, by workload. Raises ReportError where it is nothing of any."""
    found = {}
    for section in sections:
        workload, methods = workload_of(section, network.compute_seconds), methods_of(section)
        world_size = network.world_size or section.groups[0].runs[0].world_size
        if workload and methods and world_size > 1:
            found[section.workload] = Advice(section, workload, methods, network.link, world_size)
    if not found:
        raise ReportError(
            "--link: expected a finished run of a compressor with two workers or more (or --simulate)"
        )
    return found


# --- tables -----------------------------------------------------------------------------------------


def advice_sheets(advice: Advice, target: float | None) -> list[Sheet]:
    """The predicted steps, where they pay, and what a score would take."""
    sheets = [steps_sheet(advice), pays_sheet(advice)]
    if target is not None:
        sheets.append(score_sheet(advice, target))
    return sheets


def steps_sheet(advice: Advice) -> Sheet:
    """A step of each exact average and of each method, and how many a method makes meanwhile."""
    workload, link, size = advice.workload, advice.link, advice.world_size
    exact = [exact_step_seconds(baseline, workload, link, size) for baseline in BASELINES]
    rows = []
    for baseline, seconds in zip(BASELINES, exact, strict=True):
        sent = wire_bytes(exact_calls(workload.num_elements, baseline.bytes_per_element), size)
        rows.append(_step_row(f"exact {baseline.name}", sent, seconds, exact))
    for _, method in advice.methods:
        seconds = step_seconds(method, workload, link, size)
        rows.append(_step_row(method.label, wire_bytes(method.calls(size), size), seconds, exact))
    note = (
        "predicted, not measured; to ...: steps while that exact average makes one\n"
        f"compute {format_number(1e3 * workload.compute_seconds)} ms and compression as in the runs; "
        "gathers' padding and unions as they grew there\n"
        "overlapped: with the backward pass, as torch's DistributedDataParallel does"
    )
    title = f"On {advice.network}: {advice.title}"
    compared = [f"to {name}" for name in _baseline_columns()]
    return Sheet(title, ["run", "sent\nMB", "step\nms", *compared], rows, note)


def _step_row(label: str, sent: float, seconds: float, exact: Sequence[float]) -> list[str]:
    speeds = [f"{format_number(other / seconds)}x" for other in exact]
    return [label, format_number(sent / 1e6), format_number(1e3 * seconds), *speeds]


def pays_sheet(advice: Advice) -> Sheet:
    """The link's speed below which each method's step is shorter than an exact average's."""
    rows = [
        [method.label, *(_pays_below(advice, method, baseline) for baseline in BASELINES)]
        for _, method in advice.methods
    ]
    note = "the speed of a link below which a step is shorter than that exact average's"
    return Sheet(f"Pays below: {advice.title}", ["run", *_baseline_columns()], rows, note)


def _baseline_columns() -> list[str]:
    """The names of the exact averages, in two lines each."""
    kinds = {False: "flat", True: "overlapped"}
    return [f"{baseline.name.split()[0]}\n{kinds[baseline.is_overlapped]}" for baseline in BASELINES]


def _pays_below(advice: Advice, method: Method, baseline: Baseline) -> str:
    latency = advice.link.latency_seconds
    speed = break_even_speed(method, advice.workload, baseline, latency, advice.world_size)
    return {0.0: "never", inf: "always"}.get(speed) or readable_speed(speed)


def score_sheet(advice: Advice, target: float) -> Sheet:
    """What a score would take: the steps that the runs needed, at the predicted length."""
    workload, link, size = advice.workload, advice.link, advice.world_size
    columns = ["run", "reached\nby", "\nsteps", "time\ns", "sent\nMB"]
    rows = []
    for group in advice.section.groups:
        if exactness(group.runs[0].config) == 2 and group.done:
            for baseline in BASELINES:
                sent = wire_bytes(exact_calls(workload.num_elements, baseline.bytes_per_element), size)
                seconds = exact_step_seconds(baseline, workload, link, size)
                rows.append(_score_row(f"exact {baseline.name}", group, target, seconds, sent))
    for group, method in advice.methods:
        sent = wire_bytes(method.calls(size), size)
        rows.append(_score_row(method.label, group, target, step_seconds(method, workload, link, size), sent))
    score = advice.section.score
    note = "predicted: the steps that the runs took, with their number of workers; 16 bits as float32"
    return Sheet(f"To a score ({score}) of {target:g} on {advice.network}", columns, rows, note)


def _score_row(label: str, group: Group, target: float, seconds: float, sent: float) -> list[str]:
    """seconds and sent (bytes): of a step, the mean over the whole run."""
    costs = costs_to_reach(group, target)
    reached = f"{len(costs)} of {len(group.runs)}"
    if not costs:
        return [label, reached, "-", "-", "-"]
    run = group.runs[0]
    steps = fmean(cost.epochs for cost in costs) * run.epochs[-1]["step"] / len(run.epochs)
    until_then = fmean(cost.bytes for cost in costs)  # a step's bytes may differ along a run
    megabytes = until_then * sent / bytes_sent_per_step(group) / 1e6
    return [label, reached, *map(format_number, (steps, steps * seconds, megabytes))]


# --- the picture ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedLine:
    """How many steps a method makes while COMPARED_WITH makes one, over some networks."""

    label: str
    style: Style
    ratios: list[float]


def speed_lines(advice: Advice, networks: Sequence[tuple[Link, int]]) -> list[SpeedLine]:
    """A line for each other exact average, and for each method."""

    def ratios(seconds: Callable[[Link, int], float]) -> list[float]:
        return [other / seconds(*network) for other, network in zip(compared, networks, strict=True)]

    workload = advice.workload
    compared = [exact_step_seconds(COMPARED_WITH, workload, *network) for network in networks]
    others = [baseline for baseline in BASELINES if baseline is not COMPARED_WITH]
    styles = styles_of([*["exact"] * len(others), *(method.reducer for _, method in advice.methods)])
    lines = [
        (f"exact {one.name}", ratios(partial(exact_step_seconds, one, workload)))  # of a link and workers
        for one in others
    ]
    lines += [(group.label, ratios(partial(step_seconds, one, workload))) for group, one in advice.methods]
    return [SpeedLine(label, style, ys) for (label, ys), style in zip(lines, styles, strict=True)]


def over_speeds(advice: Advice, steps: int = 120) -> tuple[list[float], list[SpeedLine]]:
    """Bits per second, and the lines over them."""
    speeds = [FIRST_SPEED * (LAST_SPEED / FIRST_SPEED) ** (index / steps) for index in range(steps + 1)]
    latency, size = advice.link.latency_seconds, advice.world_size
    return speeds, speed_lines(advice, [(Link(speed, latency), size) for speed in speeds])


def over_workers(advice: Advice) -> tuple[list[float], list[SpeedLine]]:
    """Numbers of workers, and the lines over them."""
    return list(map(float, WORKERS)), speed_lines(advice, [(advice.link, count) for count in WORKERS])


def break_evens(advice: Advice) -> list[tuple[Group, float]]:
    """The configurations that break even with COMPARED_WITH at a speed that the picture covers, and that
    speed."""
    latency, size = advice.link.latency_seconds, advice.world_size
    found = [
        (group, break_even_speed(method, advice.workload, COMPARED_WITH, latency, size))
        for group, method in advice.methods
    ]
    return [(group, speed) for group, speed in found if FIRST_SPEED <= speed <= LAST_SPEED]


def draw_advice(advice: Advice) -> "Figure":
    """Draw how many steps each method makes while the overlapped bfloat16 average makes one: over links, with
    the break-even marked, and over workers."""
    from matplotlib.figure import Figure

    from sage.report.figures import plain

    figure = Figure(figsize=(13, 5.5 + len(advice.methods) / 10), dpi=110, layout="constrained")
    speeds_axes, workers_axes = figure.subplots(1, 2)
    _draw_speedups(speeds_axes, *over_speeds(advice))
    _draw_speedups(workers_axes, *over_workers(advice))
    _mark_break_even(speeds_axes, advice)

    latency = advice.link.latency_seconds
    speeds_axes.set(xlabel="link (bit/s)", title=f"{advice.title}, {1e6 * latency:g} µs a message")
    speeds_axes.set_xticks(TICKS, [readable_tick(tick) for tick in TICKS])
    workers_axes.set(xlabel="workers", title=advice.network)
    workers_axes.set_xticks(WORKERS, [str(count) for count in WORKERS])
    lines = {str(line.get_label()): line for line in speeds_axes.get_lines()}
    evens = {plain(group.label): f" ({readable_speed(speed)})" for group, speed in break_evens(advice)}
    shown = {label + evens.get(label, ""): line for label, line in lines.items() if label[0] != "_"}
    title = "predicted; x: break-even, at the speed in brackets"
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=3, handlelength=4, title=title
    )
    return figure


TICKS = (1e7, 1e8, 1e9, 1e10, 1e11)
"""Bits per second that the axis of links names."""


def readable_tick(speed: float) -> str:
    """A round speed, as in 10 Mbit/s."""
    return readable_speed(speed).replace(".0 ", " ").replace("1.00", "1")


def _draw_speedups(axes: "Axes", xs: Sequence[float], lines: Sequence[SpeedLine]) -> None:
    """Draw the lines of methods and exact averages."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from sage.report.figures import plain, wear

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color="0.5", linewidth=1)
    for speed_line in lines:
        every = max(1, len(xs) // 8)
        (line,) = axes.plot(xs, speed_line.ratios, label=plain(speed_line.label), markevery=every)
        wear(line, speed_line.style)
    axes.set_ylabel(f"times as fast as exact {COMPARED_WITH.name}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else range(1, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")


def _mark_break_even(axes: "Axes", advice: Advice) -> None:
    for group, speed in break_evens(advice):
        colour = look_of(group.reducer).colour
        axes.plot(speed, 1, marker="x", markersize=12, markeredgewidth=2, color=colour, linestyle="none")
