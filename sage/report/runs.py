"""What runs left, for the report: read from the files in their folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sage.config import flatten, read_yaml

COMPUTE = ("data", "forward", "backward", "optimizer")
PHASES = (*COMPUTE, "reduce")
# The numbers that are used of each object that a run writes.
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
    """Its workers took turns: times are one worker's, taken alone on the machine; communication has none."""

    @property
    def score(self) -> str:
        """Its name; empty before the first epoch has ended."""
        return str(self.epochs[-1].get("score.name")) if self.epochs else ""

    @property
    def progress(self) -> str:
        """How far it came."""
        last = self.steps[-1:] + self.epochs[-1:]
        epoch, step = (max((line[key] for line in last), default="-") for key in ("epoch", "step"))
        return f"at epoch {epoch}, step {step}"


# --- reading --------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> list[Path]:
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
    config = _read_config(folder / "config.yaml")
    environment = _read_json(folder / "environment.json")
    simulated = environment.get("simulated") is True
    place = f"{config['task.name']}, world size {environment['world_size']}"
    summary_path = folder / "summary.json"
    summary = _read_json(summary_path) if summary_path.exists() else {}
    lines, torn = _read_lines(folder / "metrics.jsonl")
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    return Run(
        folder=folder,
        config=config,
        place=f"{place}, simulated" if simulated else place,
        steps=list(steps.values()),
        epochs=list(epochs.values()),
        summary=summary,
        torn=torn,
        simulated=simulated,
    )


def _read_config(path: Path) -> Flat:
    config = flatten(read_yaml(path.read_bytes().decode(errors="replace"), str(path)))
    if not {"task.name", "reducer.name"} <= config.keys():
        raise ReportError(f"{path}: expected a run's resolved configuration, with task.name and reducer.name")
    return config


def _read_json(path: Path) -> Flat:
    return parse(path.read_bytes(), path, path.name)


def _read_lines(path: Path) -> tuple[list[Flat], bool]:
    """The whole lines, and whether one more was cut off at the end."""
    *texts, rest = path.read_bytes().split(b"\n")  # rest: after the last newline
    return [parse(text, f"{path}: line {number}") for number, text in enumerate(texts, 1)], bool(rest)


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


# --- numbers of a run -----------------------------------------------------------------------------


def per_step(run: Run, name: str) -> float:
    """A total of the epoch lines over the steps they count; 0 before the first, and where they have none."""
    steps = run.epochs[-1]["step"] if run.epochs else 1
    return float(sum(line.get(name, 0) for line in run.epochs) / steps)


def phases(run: Run) -> dict[str, float]:
    """Milliseconds per step; zeros before the first epoch is done."""

    def milliseconds(name: str) -> float:
        return 1000 * per_step(run, f"seconds.{name}")

    communication = milliseconds("communicate")
    compression = milliseconds("reduce") - communication
    if communication:
        communication += milliseconds("agree")  # a wait for the slowest worker, before the exchange
    return {
        **{name: milliseconds(name) for name in COMPUTE},
        "compression": compression,
        "communication": 0.0 if run.simulated else communication,
    }


def training_seconds(line: Flat) -> float:
    """Of an epoch line: all phases, without evaluation and checkpoints."""
    return float(sum(line[f"seconds.{phase}"] for phase in PHASES) + line.get("seconds.agree", 0))


def density_mean(run: Run) -> float | None:
    means = [line["density.mean"] for line in run.epochs if line.get("density.mean") is not None]
    return fmean(means) if means else None


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few."""
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None
