"""Where the time of a step goes in the published configurations: the seconds of each phase.

    python -m benchmarks.published [--steps 20] [--configs NAME,...] [--workers 2] [--reducer NAME]
                                   [--data data] [--json FILE]

Each configuration is run by run.py in a temporary folder until it has made its steps; a signal ends it.
The numbers are those of its metrics.jsonl: the seconds of a step, means over workers; of the steps the
median, the fastest and the slowest. The first step, which allocates, is not counted. communicate is a part
of reduce, and includes the wait for a slower worker. Where a data set is not prepared in the data folder, one
of the official format and size is made and thrown away.
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

from benchmarks.command import make_parser
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
    """The seconds that a phase takes in a step, over several steps."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Row:
    config: str
    data: str
    """real, or made: drawn from a seed, in the official format and size."""
    reducer: str
    steps: int
    seconds: dict[str, Seconds]
    """By phase; under step, of all phases together; communicate is a part of reduce."""
    density: float
    payload_bytes: float
    """density and payload_bytes are medians over the steps."""
    load_average: tuple[float, float]
    """Of the last minute, before and after; 2 workers of one thread each add about 2."""


def published_configs() -> list[str]:
    """Every configuration on published data, without the small ones."""
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml") if not file.stem.endswith("_small"))
    return [name for name in names if task_of(name) in PLACES]


def task_of(name: str) -> str:
    return config.load(CONFIGS / f"{name}.yaml", [], RunSettings, TABLES).task.name


def measure(name: str, arguments: argparse.Namespace, temporary: Path) -> Row:
    data, kind = find_or_make(task_of(name), arguments.data, temporary)
    # An epoch has at least one step, so this is enough for the steps and the first, which is not counted.
    changes = [f"epochs={1 + arguments.steps}", "log.every=1", "log.tensorboard=false"]
    changes += [f"reducer.name={arguments.reducer}"] if arguments.reducer else []
    settings = config.load(CONFIGS / f"{name}.yaml", changes, RunSettings, TABLES)
    command = [sys.executable, "run.py", str(CONFIGS / f"{name}.yaml"), *changes]
    command += ["--workers", str(arguments.workers), "--threads", "1"]
    command += ["--data", str(data.resolve()), "--runs", str(temporary / "runs")]
    before = load_average()
    lines = first_steps(command, temporary / "runs" / name, NUM_WARM_UP + arguments.steps)[NUM_WARM_UP:]
    return Row(
        config=name,
        data=kind,
        reducer=settings.reducer.name,
        steps=len(lines),
        seconds={phase: seconds_of(lines, phase) for phase in (*PHASES, "step")},
        density=statistics.median(line["density"] for line in lines),
        payload_bytes=statistics.median(line["payload_bytes"] for line in lines),
        load_average=(before, load_average()),
    )


def first_steps(command: list[str], folder: Path, num_steps: int) -> list[dict[str, Any]]:
    """Start a run, in a folder of runs that holds no other, and end it after its first step lines."""
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
    """The lines about steps that the run in a folder has written so far, without one that is not whole."""
    text = "".join(file.read_text() for file in folder.glob("*/metrics.jsonl"))
    lines = (json.loads(line) for line in text.splitlines(True) if line.endswith("\n"))
    return [line for line in lines if line["kind"] == "step"]


def seconds_of(lines: list[dict[str, Any]], phase: str) -> Seconds:
    """The seconds of a phase. One that a step lacks (communicate, of a single worker) took none."""
    parts = [part for part in PHASES if part != "communicate"] if phase == "step" else [phase]
    values = [sum(line["seconds"].get(part, 0.0) for part in parts) for line in lines]
    return Seconds(statistics.median(values), min(values), max(values))


def print_table(rows: list[Row]) -> None:
    table = Table("config", "data", *PHASES, "step", "fastest", "slowest", "load")
    for row in rows:
        medians = (f"{row.seconds[phase].median:.3f}" for phase in (*PHASES, "step"))
        step, load = row.seconds["step"], "{:.1f} {:.1f}".format(*row.load_average)
        table.add_row(row.config, row.data, *medians, f"{step.fastest:.3f}", f"{step.slowest:.3f}", load)
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def parse_arguments() -> argparse.Namespace:
    known = published_configs()
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps that count, of each (default: 20)")
    parser.add_argument("--configs", default=",".join(known), metavar="NAME,...", help="default: all")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of one thread each (default: 2)")
    this = "use this one instead of the configuration's"
    parser.add_argument("--reducer", choices=REDUCERS, metavar="NAME", help=this)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.workers) < 1:
        parser.error("--steps and --workers: expected 1 or more")
    arguments.configs = arguments.configs.split(",")
    if unknown := set(arguments.configs) - set(known):
        parser.error(f"--configs: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    return arguments


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run ends too
    arguments, rows, facts = parse_arguments(), [], machine()
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.configs:
            rows.append(measure(name, arguments, Path(temporary)))
            print_table(rows[-1:])
            if arguments.json:  # after each, because all together take half an hour
                content = {**facts, "world_size": arguments.workers, "rows": [asdict(row) for row in rows]}
                write_json(arguments.json, content)


if __name__ == "__main__":
    main()
