"""Finds runs, reads the files in their folders, and works out the numbers of one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

from sage import files, yamlfile
from sage.config import flatten
from sage.console import describe_gap

COMPUTE = ("data", "forward", "backward", "optimizer")
PHASES = (*COMPUTE, "reduce")
HARNESS = ("agree", "log")
"""What the harness itself costs in a step, whatever the method: the check of all gradients and signals, which
waits for the slowest worker, and what is written of a step."""
OUTSIDE = ("evaluate", "checkpoint")
"""What is done between steps."""
NEEDED = {
    "step": ["epoch", "step"],
    "epoch": [
        "epoch",
        "step",
        "score.value",
        "bytes.payload",
        "bytes.wire",
        *(f"seconds.{x}" for x in PHASES),
    ],
    "environment.json": ["world_size"],
    "summary.json": ["score.last", "score.best"],
}
"""The numbers that the report needs from each kind of object in a run's files."""
STEP_KEYS = ("epoch", "step", "density", "target_density", "union_density", "threshold")
"""What is kept of a line about a step, all numbers or None; a run has many."""
Flat = dict[str, Any]
"""A mapping without mappings in it: {"task": {"name": "cnn"}} is {"task.name": "cnn"}."""


class ReportError(ValueError):
    """Runs that cannot be reported: one line with the path and what was expected."""


@dataclass(frozen=True)
class Run:
    """What the files in a run's folder say."""

    folder: Path
    config: Flat
    workload: str
    """Task and world size, as in "digits, world size 2": runs are compared where they have the same."""
    steps: list[Flat]
    """The lines of metrics.jsonl about steps."""
    epochs: list[Flat]
    """The lines of metrics.jsonl about epochs."""
    summary: Flat
    """Empty where the run is unfinished."""
    cut_off: bool
    """The last line of metrics.jsonl was cut off, and is not among the lines."""
    gap: str
    """Which epochs have no line, in words; empty where all have one."""
    simulated: bool
    """The workers took turns in one process. The times are one worker's, measured while no other ran, and
    communication was not timed."""
    world_size: int = 1

    @property
    def score(self) -> str:
        """The score's name; empty before the first epoch has ended."""
        return str(self.epochs[-1].get("score.name")) if self.epochs else ""

    @property
    def progress(self) -> str:
        """How far an unfinished run came, in words."""
        last_lines = self.steps[-1:] + self.epochs[-1:]
        if not last_lines:
            return "at epoch -, step -"
        epoch = max(line["epoch"] for line in last_lines)
        step = max(line["step"] for line in last_lines)
        return f"at epoch {epoch}, step {step}"


# --- reading --------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Find the runs: every folder with a metrics.jsonl at or under the given ones, each once."""
    found: list[Path] = []
    for folder in folders:
        inside = [path.resolve().parent for path in sorted(folder.rglob("metrics.jsonl"))]
        if not inside:
            problem = "no metrics.jsonl in it" if folder.is_dir() else "no such folder"
            raise ReportError(f"{folder}: {problem}; expected a run's folder, or one that holds runs")
        found += inside
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> Run:
    """Read a run. Where several lines are about the same step or epoch, the last one counts.

    Raises ReportError, ConfigError or OSError.
    """
    config = _read_config(folder / "config.yaml")
    environment = _read_json(folder / "environment.json")
    simulated = environment.get("simulated") is True
    workload = f"{config['task.name']}, world size {environment['world_size']}"
    summary_path = folder / "summary.json"
    summary = _read_json(summary_path) if summary_path.exists() else {}
    lines, cut_off = _read_lines(folder / "metrics.jsonl")
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    return Run(
        folder=folder,
        config=config,
        workload=f"{workload}, simulated" if simulated else workload,
        steps=list(steps.values()),
        epochs=list(epochs.values()),
        summary=summary,
        cut_off=cut_off,
        gap=describe_gap(set(epochs), max(epochs, default=-1) + 1),
        simulated=simulated,
        world_size=int(environment["world_size"]),
    )


def _read_config(path: Path) -> Flat:
    config = flatten(yamlfile.read(path))
    if not {"task.name", "reducer.name"} <= config.keys():
        raise ReportError(f"{path}: expected a run's resolved configuration, with task.name and reducer.name")
    return config


def _read_json(path: Path) -> Flat:
    return _parse(files.read_bytes(path), path, path.name)


def _read_lines(path: Path) -> tuple[list[Flat], bool]:
    """Read the whole lines; the second value says whether one more line was cut off at the end."""
    *texts, rest = files.read_bytes(path).split(b"\n")  # rest: what follows the last newline
    return [_read_line(text, f"{path}: line {number}") for number, text in enumerate(texts, 1)], bool(rest)


def _read_line(text: bytes, origin: str) -> Flat:
    """A line of metrics.jsonl; of one about a step what is kept. Most lines are such, and are read fast."""
    try:
        line = files.parse_json(text)
        if line["kind"] == "step":
            kept = {key: line[key] for key in STEP_KEYS if key in line}
            needed = {type(kept["epoch"]), type(kept["step"])}
            if needed <= {int, float} and {*map(type, kept.values())} <= {int, float, NoneType}:
                return {"kind": "step", **kept}
    except (ValueError, LookupError, TypeError):
        pass  # said below
    return _parse(text, origin)


TEXTS = ("kind", "score.name")
"""The values of a line of metrics.jsonl that are not numbers."""


def _check_numbers(line: Flat, origin: Path | str) -> None:
    for key, value in line.items():
        if key not in TEXTS and not isinstance(value, int | float | None):
            raise ReportError(f"{origin}: {key}: expected a number, got {str(value)[:60]!r}")


def _parse(text: bytes, origin: Path | str, kind: str = "") -> Flat:
    """Parse a JSON object that has the numbers its kind needs. A line of metrics.jsonl names its own kind."""
    try:
        flat = flatten(files.parse_json(text))
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deep
        flat = {}
    needed = NEEDED.get(kind or str(flat.get("kind")), ["kind"])
    missing = [key for key in needed if not isinstance(flat.get(key), int | float)]
    if missing:
        raise ReportError(f"{origin}: expected a JSON object with {missing[0]}, got {text[:60]!r}")
    if not kind:
        _check_numbers(flat, origin)
    return flat


# --- numbers of a run -----------------------------------------------------------------------------


def per_step(run: Run, name: str) -> float:
    """The sum of a number over the epochs, divided by the number of steps; 0 where no epoch has it."""
    steps = run.epochs[-1]["step"] if run.epochs else 1
    return float(sum(line.get(name, 0) for line in run.epochs) / steps)


def phase_milliseconds(run: Run) -> dict[str, float]:
    """Milliseconds per step of each phase; 0 before the first epoch has ended, and for what was not timed.

    The harness's own phases count neither as compression nor as communication.
    """

    def milliseconds(name: str) -> float:
        return 1000 * per_step(run, f"seconds.{name}")

    communication, agree = milliseconds("communicate"), milliseconds("agree")
    return {
        **{name: milliseconds(name) for name in COMPUTE},
        "compression": milliseconds("reduce") - communication,
        "communication": 0.0 if run.simulated else communication,
        "agree": 0.0 if run.simulated else agree,  # a simulation's holds the other workers' turns
        "log": 0.0 if run.simulated else milliseconds("log"),
    }


def unaccounted_milliseconds(run: Run) -> float | None:
    """Milliseconds per step of wall time that are in no phase; None where wall time is not the run's own."""
    if run.simulated or not run.epochs or not all("seconds.wall" in line for line in run.epochs):
        return None
    timed = sum(per_step(run, f"seconds.{name}") for name in (*PHASES, *HARNESS, *OUTSIDE))
    return round(1000 * (per_step(run, "seconds.wall") - timed), 6)  # a sum's rounding is not time


def training_seconds(line: Flat) -> float:
    """The seconds of an epoch's steps, without evaluation, checkpoints and the harness's own phases."""
    return float(sum(line[f"seconds.{phase}"] for phase in PHASES))


def mean_density(run: Run) -> float | None:
    means = [line["density.mean"] for line in run.epochs if line.get("density.mean") is not None]
    return fmean(means) if means else None
