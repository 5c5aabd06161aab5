"""Compare runs: print two tables and draw one picture, from nothing but the files in the runs' folders."""

import argparse
import json
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Column, Table

from sage.config import ConfigError, read_yaml

COMPUTE = ("data", "forward", "backward", "optimizer")
PHASES = (*COMPUTE, "reduce")
# The numbers that are used of each object that a run writes.
NEEDED = {
    "step": ["epoch", "step"],
    "epoch": ["epoch", "step", "score.value", "bytes.payload", *(f"seconds.{x}" for x in PHASES)],
    "environment.json": ["world_size"],
    "summary.json": ["score.last", "score.best"],
}
RESULTS = ("\nbest", "density\nmean / target", "\np99", "payload\nMB", "\nto exact")
TIMES = ("compute\nms", "compression\nms", "communication\nms", "total\nms", "speed\nto exact")
SIMULATED = "\nsimulated: one worker's times, taken alone on the machine; communication has none"
LAYOUT: Any = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left", "caption_justify": "left"}
UNITS = {"accuracy": "fraction", "perplexity": "tokens", "density": "fraction", "threshold": "|gradient|"}
# Lines and bars differ in more than colour, so that they can be told apart in grey.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#007a55", "#aa4488")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^DvPX"
FILLS = ("#eeeeee ...", "#c6dbef ", "#9ecae1 //", "#eeeeee \\\\", "#fdae6b xx", "#555555 ")  # one a phase
Flat = dict[str, Any]  # {"task": {"name": "cnn"}} as {"task.name": "cnn"}


class ReportError(ValueError):
    """Runs that cannot be reported: one line with the path and what was expected."""


@dataclass(frozen=True)
class Run:
    """place: task and world size. summary: empty if unfinished. torn: the last line was cut off: left out."""

    folder: Path
    config: Flat
    place: str
    steps: list[Flat]
    epochs: list[Flat]
    summary: Flat
    torn: bool
    simulated: bool

    @property
    def score(self) -> str:
        """Its name; empty before the first epoch has ended."""
        return str(self.epochs[-1].get("score.name")) if self.epochs else ""


def find_runs(folders: list[Path]) -> list[Path]:
    """Every folder with a metrics.jsonl at or under the given ones, once each."""
    found: list[Path] = []
    for folder in folders:
        inside = [path.resolve().parent for path in sorted(folder.rglob("metrics.jsonl"))]
        if not inside:
            problem = "no metrics.jsonl in it" if folder.is_dir() else "no such folder"
            raise ReportError(f"{folder}: {problem}; expected a run's folder, or one that holds runs")
        found += inside
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> Run:
    """Raises ReportError, ConfigError or OSError. Of lines about the same step or epoch the last counts."""
    path = folder / "config.yaml"
    config = flatten(read_yaml(path.read_bytes().decode(errors="replace"), str(path)))
    if not {"task.name", "reducer.name"} <= config.keys():
        raise ReportError(f"{path}: expected a run's resolved configuration, with task.name and reducer.name")
    path = folder / "environment.json"
    environment = parse(path.read_bytes(), path, path.name)
    simulated = environment.get("simulated") is True
    place = f"{config['task.name']}, world size {environment['world_size']}{', simulated' * simulated}"
    path = folder / "summary.json"
    summary = parse(path.read_bytes(), path, path.name) if path.exists() else {}
    path = folder / "metrics.jsonl"
    *texts, rest = path.read_bytes().split(b"\n")  # rest: after the last newline, nothing or a line cut off
    lines = [parse(text, f"{path}: line {number}") for number, text in enumerate(texts, 1)]
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    return Run(folder, config, place, [*steps.values()], [*epochs.values()], summary, bool(rest), simulated)


def parse(text: bytes, origin: Path | str, kind: str = "") -> Flat:
    """A JSON object with the numbers that its kind needs; a line of metrics.jsonl says itself which it is."""
    try:
        flat = flatten(json.loads(text))
    except ValueError:  # not JSON, or not UTF-8
        flat = {}
    needed = NEEDED.get(kind or str(flat.get("kind")), ["kind"])
    missing = [key for key in needed if not isinstance(flat.get(key), int | float)]
    if missing:
        raise ReportError(f"{origin}: expected a JSON object with {missing[0]}, got {text[:60]!r}")
    return flat


def flatten(tree: Any, prefix: str = "") -> Flat:
    """Empty for what is no mapping."""
    flat: Flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def per_step(run: Run, name: str) -> float:
    """A total of the epoch lines over the steps they count; 0 before the first, and where they have none."""
    steps = run.epochs[-1]["step"] if run.epochs else 1
    return float(sum(line.get(name, 0) for line in run.epochs) / steps)


def phases(run: Run) -> dict[str, float]:
    """Milliseconds per step; zeros before the first epoch is done, and for a simulation's communication."""
    times = {name: 1000 * per_step(run, f"seconds.{name}") for name in (*COMPUTE, "reduce", "communicate")}
    times["compression"] = times.pop("reduce") - times["communicate"]
    return times | {"communication": times.pop("communicate") * (not run.simulated)}


def exact_for(run: Run, runs: list[Run]) -> Run | None:
    """The first finished exact run of the same task and world size."""
    task = {key: value for key, value in run.config.items() if key.startswith("task.")}
    exact = [other for other in runs if other.config["reducer.name"] == "exact" and other.summary]
    alike = [other for other in exact if other.place == run.place and task.items() <= other.config.items()]
    return alike[0] if alike else None


def label_runs(runs: list[Run]) -> list[str]:
    """A name each, no two alike: the reducer, then the first keys that tell apart the runs still alike."""
    ranks = {"reducer": 0, "seed": 2, "log": 3, "run": 4, "at": 5}  # the other keys: 1
    flats = [run.config | {"run": run.folder.name, "at": run.folder} for run in runs]
    names = [run.config["reducer.name"] for run in runs]
    if len({run.place for run in runs}) > 1:
        names = [f"{name} ({run.place})" for name, run in zip(names, runs, strict=True)]
    for key in sorted(set().union(*flats), key=lambda key: (ranks.get(key.split(".")[0], 1), key)):
        short = key.removesuffix(".name").split(".")[-1]
        pairs = [(name, f"{name} {short}={flat.get(key)}") for name, flat in zip(names, flats, strict=True)]
        longer = {name: {b for a, b in pairs if a == name} for name in names}
        names = [b if len(longer[a]) > 1 else a for a, b in pairs]
    return [name if run.summary else f"{name} (unfinished)" for name, run in zip(names, runs, strict=True)]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, zeros too: 0.970, 52.1, 1,234; '-' for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def results_row(run: Run, exact: Run | None) -> list[str]:
    """Score last and best, density mean / target and p99, payload in MB and, per step, against exact's."""
    last = run.epochs[-1]["score.value"] if run.epochs else None
    scores = [number(run.summary.get("score.last", last), 4), number(run.summary.get("score.best"), 4)]
    means = [line["density.mean"] for line in run.epochs if line.get("density.mean") is not None]
    target = run.steps[-1].get("target_density") if run.steps else None
    density = number(fmean(means) if means else None) + (f" / {target:g}" if target else "")
    megabytes = sum(line["bytes.payload"] for line in run.epochs) / 1e6
    mine, exacts = per_step(run, "bytes.payload"), per_step(exact, "bytes.payload") if exact else 0
    ratio = "-"
    if mine and exacts:
        word = " less" if mine < exacts else " more" if mine > exacts else ""
        ratio = f"{number(max(exacts / mine, mine / exacts))}x{word}"
    return [*scores, density, number(run.summary.get("density.p99")), number(megabytes, 4), ratio]


def time_row(run: Run, exact: Run | None) -> list[str]:
    """Milliseconds per step, and the steps made while exact makes one."""
    if not run.epochs:
        return ["-"] * len(TIMES)
    *compute, compression, communication = phases(run).values()
    total = sum(compute) + compression + communication
    speed = f"{number(sum(phases(exact).values()) / total)}x" if exact and not run.simulated else "-"
    waiting = (None, None) if run.simulated else (communication, total)
    return [*map(number, (sum(compute), compression, *waiting)), speed]


def build_tables(runs: list[Run]) -> list[Table]:
    """What came out, and where the time went. In 80 columns long names are folded; numbers are never."""
    places = " or ".join(sorted({run.place for run in runs}))
    results = Table(Column("run", overflow="fold"), title=f"Results: {places}", **LAYOUT)
    results.caption = "payload: handed to collectives by one worker; to exact: per step"
    note = f"compute: {', '.join(COMPUTE)}; evaluation is not counted" + SIMULATED * ("simulated" in places)
    times = Table(Column("run", overflow="fold"), title="\nTime per step", caption=note, **LAYOUT)
    for table, columns in ((results, (f"{score_names(runs)}\nlast", *RESULTS)), (times, TIMES)):
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for run, name in zip(runs, label_runs(runs), strict=True):
        last = run.steps[-1:] + run.epochs[-1:]
        epoch, step = (max((line[key] for line in last), default="-") for key in ("epoch", "step"))
        cell = name if run.summary else f"{name}\nat epoch {epoch}, step {step}"
        results.add_row(cell, *results_row(run, exact_for(run, runs)))
        times.add_row(cell, *time_row(run, exact_for(run, runs)))
    return [results, times]


def score_names(runs: list[Run]) -> str:
    return " or ".join(sorted({run.score for run in runs if run.score})) or "score"


def draw(runs: list[Run]) -> Figure:
    """A panel each for score, density, threshold and time per step; below them the runs' legend."""
    labels = [textwrap.fill(name, 28) for name in label_runs(runs)]
    figure = Figure(figsize=(12, 8 + len(runs) / 4), dpi=130, layout="constrained")
    scores, densities, thresholds, times = figure.subplots(2, 2).flat
    curves = [[(line["epoch"] + 1, line["score.value"]) for line in run.epochs] for run in runs]
    draw_lines(scores, curves, labels)
    unit = UNITS.get(score_names(runs), "no unit")
    scores.set(title="Score", xlabel="training (epochs)", ylabel=f"{score_names(runs)} ({unit})")
    for targets in {tuple(over_steps(run, "target_density")) for run in runs} - {()}:
        densities.plot(*zip(*targets, strict=True), color="0.7", linewidth=4, label="target density")
    for axes, name in ((densities, "density"), (thresholds, "threshold")):
        draw_lines(axes, [over_steps(run, name) for run in runs], labels)
        axes.set(title=name.title(), xlabel="training (steps)", ylabel=f"{name} ({UNITS[name]})")
        axes.set_yscale("log")
    draw_times(times, runs, labels)
    lines = {line.get_label(): line for line in (*scores.get_lines(), *densities.get_lines())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, handlelength=4)
    return figure


def over_steps(run: Run, name: str) -> list[tuple[float, float]]:
    """(step, value) where there is one; a gap for 0, which a log axis cannot show; none for a dense run."""
    values = [(line["step"], line[name] or nan) for line in run.steps if line.get(name) is not None]
    return values if name == "threshold" or any(value != 1 for _, value in values) else []


def draw_lines(axes: Axes, curves: list[list[tuple[float, float]]], labels: list[str]) -> None:
    """One line a run, empty ones too, so that a run looks the same in every panel."""
    for i, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        every = max(1, len(curve) // 8)
        (line,) = axes.plot([x for x, _ in curve], [y for _, y in curve], label=label)
        line.set(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        line.set(linestyle=DASHES[i % len(DASHES)], markevery=(i * every // len(curves), every))
    if not any(curves):
        axes.text(0.5, 0.5, "none of the runs has one", ha="center", transform=axes.transAxes)
    axes.grid(color="0.9")


def draw_times(axes: Axes, runs: list[Run], labels: list[str]) -> None:
    """A bar a run, the first on top, stacked from the phases, with its length written at its end."""
    ends = [0.0] * len(runs)
    times = [phases(run) for run in runs]
    for phase, fill in zip(times[0], FILLS, strict=True):
        colour, hatch = fill.split(" ")
        widths = [time[phase] for time in times]
        axes.barh(labels, widths, left=ends, color=colour, hatch=hatch, edgecolor="black", label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        axes.text(end, row, f" {number(end)}" if end else " no epoch done", va="center")
    axes.set(title="Time per step", xlabel="time per step (ms)", ylabel="run (reducer)")
    axes.set(xlim=(0, 1.15 * max(ends) or 1), ylim=(len(runs) - 0.5, -0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)


def save(figure: Figure, output: Path) -> None:
    """Whole or not at all: written under another name, then renamed."""
    part = output.with_name(f".{output.name}.part")
    figure.savefig(part, format="png")
    part.replace(output)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sage.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run, or a folder of runs")
    default = "report.png in the common parent of the RUNs"
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"the PNG to write (default: {default})")
    options = parser.parse_args(arguments)
    output = options.output or Path(os.path.commonpath([*map(Path.resolve, options.runs)]), "report.png")
    width = max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 100
    try:
        runs = [read_run(folder) for folder in find_runs(options.runs)]
        runs.sort(key=lambda run: run.config["reducer.name"] != "exact")
        Console(width=width, markup=False, highlight=False, emoji=False).print(*build_tables(runs))
        for path in [run.folder / "metrics.jsonl" for run in runs if run.torn]:
            print(f"{path}: the last line was cut off, and is ignored")
        save(draw(runs), output)
        print(output)
        return 0
    except (ReportError, ConfigError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
