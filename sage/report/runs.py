"""What runs left, for the report: read from the files in their folders, gathered by configuration."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
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
SHORT = 20
"""A longer name does not fit beside a table's numbers in 80 columns: then names are numbered, with a key."""
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


@dataclass(frozen=True)
class Group:
    """One configuration: its finished runs, a seed each, or one unfinished run. name: for where space is
    short."""

    runs: list[Run]
    label: str
    name: str

    @property
    def done(self) -> bool:
        return bool(self.runs[0].summary)

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """A number of each run that has one."""
        return [value for value in map(of, self.runs) if value is not None]


@dataclass(frozen=True)
class Section:
    """What can be compared: the groups of one task and world size."""

    place: str
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def score(self) -> str:
        return " or ".join(sorted({run.score for run in self.runs if run.score})) or "score"

    @property
    def is_numbered(self) -> bool:
        return any(group.name != group.label for group in self.groups)


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


# --- numbers of a run -----------------------------------------------------------------------------


def per_step(run: Run, name: str) -> float:
    """A total of the epoch lines over the steps they count; 0 before the first, and where they have none."""
    steps = run.epochs[-1]["step"] if run.epochs else 1
    return float(sum(line.get(name, 0) for line in run.epochs) / steps)


def phases(run: Run) -> dict[str, float]:
    """Milliseconds per step; zeros before the first epoch is done."""
    times = {name: 1000 * per_step(run, f"seconds.{name}") for name in (*COMPUTE, "reduce", "communicate")}
    times["compression"] = times.pop("reduce") - times["communicate"]
    # For the slowest worker, before the exchange.
    waiting = 1000 * per_step(run, "seconds.agree") if times["communicate"] else 0.0
    return times | {"communication": (times.pop("communicate") + waiting) * (not run.simulated)}


def training_seconds(line: Flat) -> float:
    """Of an epoch line: all phases, without evaluation and checkpoints."""
    return float(sum(line[f"seconds.{phase}"] for phase in PHASES) + line.get("seconds.agree", 0))


def density_mean(run: Run) -> float | None:
    means = [line["density.mean"] for line in run.epochs if line.get("density.mean") is not None]
    return fmean(means) if means else None


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few."""
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None


# --- gathering ------------------------------------------------------------------------------------


def gather(runs: Sequence[Run]) -> list[Section]:
    """A section for each task and world size; in it a group a configuration, exact ones first.

    Runs that differ in the seed alone are one group. Of runs that are alike in everything the first of each
    seed is in one group, the second in another; an unfinished run is a group of its own.
    """
    sections = []
    for place in dict.fromkeys(run.place for run in runs):
        gathered: dict[str, list[Run]] = {}
        seen: Counter[str] = Counter()
        for run in (run for run in runs if run.place == place):
            config = {key: value for key, value in run.config.items() if key != "seed"}
            alike = json.dumps(
                [config, run.config.get("seed"), bool(run.summary)], sort_keys=True, default=str
            )
            seen[alike] += 1
            which = seen[alike] if run.summary else str(run.folder)
            key = json.dumps([config, bool(run.summary), which], sort_keys=True, default=str)
            gathered.setdefault(key, []).append(run)
        members = sorted(gathered.values(), key=lambda runs: -exactness(runs[0].config))
        sections.append(Section(place, _named(members)))
    return sections


def _named(members: list[list[Run]]) -> list[Group]:
    labels = label(members)
    fits = max(map(len, labels)) <= SHORT
    reducers = [runs[0].config["reducer.name"] for runs in members]
    names = labels if fits else [f"{i} {reducer}" for i, reducer in enumerate(reducers, 1)]
    return [Group(*parts) for parts in zip(members, labels, names, strict=True)]


def label(members: Sequence[list[Run]]) -> list[str]:
    """A name a group, no two alike: the reducer, then the first keys that tell apart those still alike."""
    # The other keys: 1.
    ranks = {"reducer": 0, "state": 2, "seed": 3, "log": 4, "checkpoint": 4, "resume": 4, "run": 5, "at": 6}
    firsts = [runs[0] for runs in members]
    flats = [
        run.config | {"state": bool(run.summary), "run": run.folder.name, "at": run.folder} for run in firsts
    ]
    for flat, runs in zip(flats, members, strict=True):
        flat["seed"] = ",".join(str(run.config.get("seed")) for run in runs)
    names = [run.config["reducer.name"] for run in firsts]
    for key in sorted(set().union(*flats), key=lambda key: (ranks.get(key.split(".")[0], 1), key)):
        if key == "state":
            names = [
                name + " (unfinished)" * (not flat[key]) for name, flat in zip(names, flats, strict=True)
            ]
            continue
        short = key.removesuffix(".name").split(".")[-1]
        pairs = [(name, f"{name} {short}={flat.get(key)}") for name, flat in zip(names, flats, strict=True)]
        longer = {name: {b for a, b in pairs if a == name} for name in names}
        names = [b if len(longer[a]) > 1 else a for a, b in pairs]
    return names


def exactness(config: Flat) -> int:
    """2 for the plain all-reduce, 1 for one of fewer bits, 0 for a compressor."""
    if config["reducer.name"] != "exact":
        return 0
    return 2 if config.get("reducer.dtype", "float32") == "float32" else 1


def exact_for(group: Group, groups: Sequence[Group]) -> Group | None:
    """The first finished group of the plain all-reduce with the same task's settings and world size."""
    mine = group.runs[0]
    task = {key: value for key, value in mine.config.items() if key.startswith("task.")}
    for other in groups:
        config, place = other.runs[0].config, other.runs[0].place
        is_alike = place == mine.place and task.items() <= config.items()
        if exactness(config) == 2 and other.done and is_alike:
            return other
    return None
