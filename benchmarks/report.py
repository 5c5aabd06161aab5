"""How long a report of many runs takes, how much memory it needs, and how long a large sweep's listing takes.

    python -m benchmarks.report [--configurations 300] [--lines 340] [--points 4000] [--json FILE]

The runs are made up, in a temporary folder: as many configurations as asked for, each one run with as many
step lines as the quickstart's runs have, and ten epochs. The sweep has as many points, none of which was run.
Each command runs in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.command import make_parser
from sage import yamlfile
from sage.files import write_json

ROOT = Path(__file__).parent.parent
EPOCHS = 10
REDUCERS = ("exact", "topk", "global_topk", "threshold", "sage", "powersgd", "sign_norm", "atomo")


@dataclass(frozen=True)
class Row:
    what: str
    seconds: float
    processor_seconds: float
    memory_bytes: int
    """The largest resident memory."""


def make_runs(home: Path, count: int, num_lines: int) -> None:
    """Write the folders of finished runs, all of different configurations."""
    for index in range(count):
        folder = home / f"run{index:04}"
        folder.mkdir(parents=True)
        reducer = {"name": REDUCERS[index % len(REDUCERS)], "density": (1 + index // len(REDUCERS)) / 1000}
        config = {"seed": 1, "epochs": EPOCHS, "task": {"name": "digits"}, "reducer": reducer}
        score = {"name": "accuracy", "higher_is_better": True, "last": 0.9, "best": 0.95}
        (folder / "config.yaml").write_text(yamlfile.dump(config))
        (folder / "environment.json").write_text(json.dumps({"world_size": 4}))
        (folder / "metrics.jsonl").write_text("".join(made_lines(index, num_lines)))
        (folder / "summary.json").write_text(json.dumps({"score": score, "density": {"p99": 0.02}}))


def made_lines(index: int, num_lines: int) -> list[str]:
    """The lines of one run's metrics.jsonl."""
    phases = ("data", "forward", "backward", "agree", "reduce", "communicate", "optimizer", "evaluate")
    seconds = {name: 0.001 * (1 + index % 7) for name in phases} | {"wall": 0.02}
    sent = {"payload": 20000.0, "padding": 0.0, "wire": 60000.0}
    lines, per_epoch = [], max(1, num_lines // EPOCHS)
    for epoch in range(EPOCHS):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            line = {"kind": "step", "epoch": epoch, "step": step, "loss": 1 / (1 + step), "lr": 0.1}
            line |= {"target_density": 0.01, "union_density": 0.02, "density": 0.01 + 0.001 * (step % 3)}
            line |= {"threshold": 0.5, "compression_error": 0.9, "residual_norm": 1.0, "gradient_norm": 2.0}
            line |= {"payload_bytes": 20000.0, "padding_bytes": 0.0, "wire_bytes": 60000.0}
            lines.append(json.dumps(line | {"seconds": seconds}) + "\n")
        line = {"kind": "epoch", "epoch": epoch, "step": (epoch + 1) * per_epoch, "train": {"loss": 0.1}}
        line |= {"test": {"accuracy": 0.9}, "score": {"name": "accuracy", "value": 0.9 - 0.5 / (epoch + 1)}}
        line |= {"density": {"mean": 0.011, "std": 0.001, "p99": 0.012}, "bytes": sent, "seconds": seconds}
        lines.append(json.dumps(line) + "\n")
    return lines


def measure(what: str, command: list[str]) -> Row:
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: it failed")
    return Row(what, time.monotonic() - started, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss)


def measure_report(home: Path, arguments: argparse.Namespace) -> Row:
    make_runs(home / "runs", arguments.configurations, arguments.lines)
    what = f"report of {arguments.configurations} configurations, {arguments.lines} step lines each"
    return measure(what, ["-m", "sage.report", str(home / "runs")])


def measure_listing(home: Path, num_points: int) -> Row:
    densities = [round((1 + index) / (2 * num_points), 8) for index in range(num_points)]
    sweep = {"base": str(ROOT / "configs" / "digits.yaml"), "seeds": [1]}
    grid = {"reducer.name": ["topk"], "reducer.density": densities}
    (home / "sweep.yaml").write_text(yamlfile.dump({**sweep, "grid": grid}))
    command = ["run.py", "--sweep", str(home / "sweep.yaml"), "--list", "--runs", str(home / "none")]
    return measure(f"list of a sweep of {num_points} points", command)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--configurations", type=int, default=300)
    parser.add_argument("--lines", type=int, default=340)
    parser.add_argument("--points", type=int, default=4000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        rows = [measure_report(home, arguments), measure_listing(home, arguments.points)]
    for row in rows:
        cost = f"{row.seconds:.1f} s ({row.processor_seconds:.1f} s of processor)"
        print(f"{row.what}: {cost}, {row.memory_bytes / 1e6:.0f} MB")
    if arguments.json:
        from benchmarks.machine import (
            machine,
        )  # imports torch: a command that it starts would count its memory

        write_json(arguments.json, {"machine": machine(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
