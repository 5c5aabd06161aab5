"""Where the time of a step goes in the published configurations: seconds by phase over some steps of each.

    python -m benchmarks.published [--steps 20] [--configs NAME,...] [--workers 2] [--reducer NAME]
                                   [--data data] [--json FILE]

Each configuration is a run of run.py in a temporary folder, ended by a signal when it has made its steps, and
what is shown is its own metrics.jsonl: seconds a step, means over workers; the median over the steps, the
fastest and the slowest. The first step, which allocates, is not counted. communicate is a part of reduce, and
has a worker's wait for the slower one in it. Where a data set is not prepared in the data folder, one of the
official format and size is made and thrown away.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import load_average, machine
from benchmarks.made import PLACES, find_or_make
from reducers import REDUCERS
from run import TABLES
from sage import config
from sage.files import write_json
from sage.runfolder import provenance
from sage.training.settings import RunSettings

CONFIGS = provenance.ROOT / "configs"
NUM_WARM_UP = 1
PHASES = ("data", "forward", "backward", "agree", "reduce", "communicate", "optimizer")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Seconds:
    """Of a phase of one step, over the steps."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Row:
    config: str
    data: str
    """real, or made: of the official format and size, drawn from a seed."""
    reducer: str
    steps: int
    seconds: dict[str, Seconds]
    """By phase; step: of the phases together, without communicate, which is in reduce."""
    density: float
    payload_bytes: float
    """Medians over the steps."""
    load_average: tuple[float, float]
    """Of the last minute, before and after: 2 workers of one thread each are about 2 of it."""


def published_configs() -> list[str]:
    """Every configuration on published data, without the small ones."""
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml") if not file.stem.endswith("_small"))
    return [name for name in names if task_of(name) in PLACES]


def task_of(name: str) -> str:
    return config.load(CONFIGS / f"{name}.yaml", [], RunSettings, TABLES).task.name


def measure(name: str, arguments: argparse.Namespace, temporary: Path) -> Row:
    data, kind = find_or_make(task_of(name), arguments.data, temporary)
    # An epoch has a step or more: so many epochs have the steps, and the first, which is not counted.
    changes = [f"epochs={1 + arguments.steps}", "log.every=1", "log.tensorboard=false"]
    changes += [f"reducer.name={arguments.reducer}"] if arguments.reducer else []
    settings = config.load(CONFIGS / f"{name}.yaml", changes, RunSettings, TABLES)
    command = [sys.executable, "run.py", str(CONFIGS / f"{name}.yaml"), *changes]
    command += ["--workers", str(arguments.workers), "--threads", "1"]
    command += ["--data", str(data.resolve()), "--runs", str(temporary / "runs")]
    before = load_average()
    lines = first_steps(command, temporary / "runs" / name, NUM_WARM_UP + arguments.steps)[NUM_WARM_UP:]
    return Row(
        name,
        kind,
        settings.reducer.name,
        len(lines),
        {phase: seconds_of(lines, phase) for phase in (*PHASES, "step")},
        statistics.median(line["density"] for line in lines),
        statistics.median(line["payload_bytes"] for line in lines),
        (before, load_average()),
    )


def first_steps(command: list[str], folder: Path, num_steps: int) -> list[dict[str, Any]]:
    """The first step lines of a run, in a folder of runs of its own; the run is ended then."""
    with subprocess.Popen(command, cwd=provenance.ROOT, stdout=subprocess.DEVNULL) as run:
        try:
            while len(lines := step_lines(folder)) < num_steps:
                if run.poll() is not None:
                    raise SystemExit(
                        f"benchmarks.published: {' '.join(command)} ended after {len(lines)} steps"
                    )
                time.sleep(POLL_SECONDS)
        finally:
            run.terminate()
    return lines[:num_steps]


def step_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines about steps that the run in a folder has written so far."""
    text = "".join(file.read_text() for file in folder.glob("*/metrics.jsonl"))
    lines = (json.loads(line) for line in text.splitlines(True) if line.endswith("\n"))
    return [line for line in lines if line["kind"] == "step"]


def seconds_of(lines: list[dict[str, Any]], phase: str) -> Seconds:
    """A phase that did not take place (communicate, of one worker) took no time."""
    parts = [part for part in PHASES if part != "communicate"] if phase == "step" else [phase]
    values = [sum(line["seconds"].get(part, 0.0) for part in parts) for line in lines]
    return Seconds(statistics.median(values), min(values), max(values))


def show(rows: list[Row]) -> None:
    table = Table("config", "data", *PHASES, "step", "fastest", "slowest", "load")
    for row in rows:
        medians = (f"{row.seconds[phase].median:.3f}" for phase in (*PHASES, "step"))
        step, load = row.seconds["step"], "{:.1f} {:.1f}".format(*row.load_average)
        table.add_row(row.config, row.data, *medians, f"{step.fastest:.3f}", f"{step.slowest:.3f}", load)
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def parse() -> argparse.Namespace:
    known = published_configs()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each (default: 20)")
    parser.add_argument("--configs", default=",".join(known), metavar="NAME,...", help="default: all")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of one thread each (default: 2)")
    parser.add_argument("--reducer", choices=REDUCERS, help="in place of the configuration's")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they were made")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.workers) < 1:
        parser.error("--steps and --workers: expected 1 or more")
    arguments.configs = arguments.configs.split(",")
    if unknown := set(arguments.configs) - set(known):
        parser.error(f"--configs: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    return arguments


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the run is ended too
    arguments, rows, facts = parse(), [], machine()
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.configs:
            rows.append(measure(name, arguments, Path(temporary)))
            show(rows[-1:])
            if arguments.json:  # after each: all together take half an hour
                content = {**facts, "world_size": arguments.workers, "rows": [asdict(row) for row in rows]}
                write_json(arguments.json, content)


if __name__ == "__main__":
    main()
