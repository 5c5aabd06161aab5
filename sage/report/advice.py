"""What the advisor says of a section: tables for one network, and a picture over networks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from sage.report.runs import ReportError
from sage.report.tables import Sheet, costs_to_reach, format_number

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


def advise(sections: Sequence[Section], network: Network) -> list[Advice]:
    """What can be said of each section. Raises ReportError where it is nothing of any."""
    found = []
    for section in sections:
        workload, methods = workload_of(section, network.compute_seconds), methods_of(section)
        world_size = network.world_size or section.groups[0].runs[0].world_size
        if workload and methods and world_size > 1:
            found.append(Advice(section, workload, methods, network.link, world_size))
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
    costs = costs_to_reach(group, target)
    reached = f"{len(costs)} of {len(group.runs)}"
    if not costs:
        return [label, reached, "-", "-", "-"]
    run = group.runs[0]
    steps = fmean(cost.epochs for cost in costs) * run.epochs[-1]["step"] / len(run.epochs)
    return [label, reached, *map(format_number, (steps, steps * seconds, steps * sent / 1e6))]


# --- the picture ------------------------------------------------------------------------------------


def draw_advice(advice: Advice) -> "Figure":
    """Draw how many steps each method makes while the overlapped bfloat16 average makes one: over links, with
    the break-even marked, and over workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5 + len(advice.methods) / 10), dpi=110, layout="constrained")
    over_speeds, over_workers = figure.subplots(1, 2)
    latency, size = advice.link.latency_seconds, advice.world_size
    steps = 120
    speeds = [FIRST_SPEED * (LAST_SPEED / FIRST_SPEED) ** (index / steps) for index in range(steps + 1)]
    _draw_speedups(over_speeds, advice, speeds, lambda speed: (Link(speed, latency), size))
    _draw_speedups(over_workers, advice, WORKERS, lambda count: (advice.link, int(count)))
    _mark_break_even(over_speeds, advice)

    over_speeds.set(xlabel="link (bit/s)", title=f"{advice.title}, {1e6 * latency:g} µs a message")
    ticks = (1e7, 1e8, 1e9, 1e10, 1e11)
    over_speeds.set_xticks(
        ticks, [readable_speed(tick).replace(".0 ", " ").replace("1.00", "1") for tick in ticks]
    )
    over_workers.set(xlabel="workers", title=advice.network)
    over_workers.set_xticks(WORKERS, [str(count) for count in WORKERS])
    lines = {str(line.get_label()): line for line in over_speeds.get_lines()}
    shown = {label: line for label, line in lines.items() if not label.startswith("_")}
    title = "predicted; x: break-even"
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=3, handlelength=4, title=title
    )
    return figure


def _draw_speedups(
    axes: "Axes", advice: Advice, xs: Iterable[float], place: Callable[[float], tuple[Link, int]]
) -> None:
    """Draw a line for each method and each other exact average. place: the network of an x."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    from sage.report.figures import plain, wear
    from sage.report.looks import styles_of

    xs = list(xs)
    networks = [place(x) for x in xs]
    compared = [exact_step_seconds(COMPARED_WITH, advice.workload, *network) for network in networks]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color="0.5", linewidth=1)
    lines = {
        f"exact {baseline.name}": [
            exact_step_seconds(baseline, advice.workload, *network) for network in networks
        ]
        for baseline in BASELINES
        if baseline is not COMPARED_WITH
    }
    styles = styles_of([*["exact"] * len(lines), *(method.reducer for _, method in advice.methods)])
    lines |= {
        group.label: [step_seconds(method, advice.workload, *network) for network in networks]
        for group, method in advice.methods
    }
    for (label, seconds), style in zip(lines.items(), styles, strict=True):
        ys = [other / one for other, one in zip(compared, seconds, strict=True)]
        (line,) = axes.plot(xs, ys, label=plain(label), markevery=max(1, len(xs) // 8))
        wear(line, style)
    axes.set_ylabel(f"times as fast as exact {COMPARED_WITH.name}")
    low, high = axes.get_ylim()
    plain_number = FuncFormatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_major_formatter(plain_number)
    axes.yaxis.set_minor_formatter(plain_number if high < 8 * low else NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")


def _mark_break_even(axes: "Axes", advice: Advice) -> None:
    from sage.report.looks import look_of

    for _, method in advice.methods:
        latency = advice.link.latency_seconds
        speed = break_even_speed(method, advice.workload, COMPARED_WITH, latency, advice.world_size)
        if FIRST_SPEED <= speed <= LAST_SPEED:
            colour = look_of(method.reducer).colour
            axes.plot(speed, 1, marker="x", markersize=12, markeredgewidth=2, color=colour, linestyle="none")
            text = axes.annotate(readable_speed(speed), (speed, 1), (-6, -8), textcoords="offset points")
            text.set(color=colour, rotation=45, ha="right", va="top", zorder=5)
