"""A step's exchange over limited links: four hosts of the virtual cluster (tests/cluster), gloo.

    python -m benchmarks.network [--layout resnet18|lstm] [--rates 100mbit 1gbit] [--json FILE]

Needs root and what tests/cluster/virtual-cluster names. One worker a host, one thread each, all on this
machine's cores. All reducers take turns. Steps are measured in two ways, in turn:

- together: all workers at once, as they come. With fewer cores than workers, a worker's compression also
  waits for a core, and its collectives wait for the others.
- alone: one worker computes at a time, and every collective begins when all workers are ready. So
  compression and communication are those of hosts with a core for each worker; total is their sum.

A step counts as long as its slowest worker; the figures are medians over steps. The model is the ledger's
wire_bytes over the link's rate. The link lets a burst of 256 kB pass at once (tc's tbf), so the model is no
lower bound for messages of about that size. The gradients are those of benchmarks.reduce, and SAGE's first
threshold and the hard threshold are fitted to the target density as there. other_cores says how many of the
machine's cores other work kept busy meanwhile: figures taken beside much of it are to be repeated.
"""

import argparse
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.network_worker import BITS, NUM_HOSTS, Row
from benchmarks.reduce import LAYOUTS
from sage.files import write_text

ROOT = Path(__file__).parent.parent
TOOL = str(ROOT / "tests" / "cluster" / "virtual-cluster")


def busy_seconds() -> tuple[float, float]:
    """Processor seconds of the whole machine so far, and those of this program's ended workers."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK"), used.ru_utime + used.ru_stime


def run_group(layout: str, rate: str, port: int) -> list[Row]:
    """Measure on fresh processes, one a host, with links of this rate."""
    subprocess.run([TOOL, "rate", rate], check=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.network_worker", "--layout", layout, "--rate", rate]
        command += ["--meeting", f"10.77.0.1:{port}", "--out", str(out)]
        started, (machine, own) = time.monotonic(), busy_seconds()
        processes = [
            subprocess.Popen([TOOL, "on", f"n{rank + 1}", *command, "--rank", str(rank)], cwd=ROOT)
            for rank in range(NUM_HOSTS)
        ]
        if any([process.wait() for process in processes]):  # every one is waited for
            raise SystemExit("benchmarks.network: a worker failed")
        machine_now, own_now = busy_seconds()
        others = (machine_now - machine - (own_now - own)) / (time.monotonic() - started)
        return [Row(**row | {"other_cores": others}) for row in json.loads(out.read_text())]


def show(rows: list[Row]) -> None:
    exact = {row.rate: row for row in rows if row.reducer == "exact" and not row.settings}
    table = Table("link", "reducer", "settings", "density", "collectives")
    for name in ("model", "communication", "compression", "total", "compression*", "total*", "x", "x*"):
        table.add_column(name, justify="right")
    for row in rows:
        dense = exact[row.rate]
        settings = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.settings.items()
        )
        times = (
            row.model_ms,
            row.communication_ms,
            row.compression_alone_ms,
            row.total_alone_ms,
            row.compression_together_ms,
            row.total_together_ms,
        )
        ratios = (dense.total_alone_ms / row.total_alone_ms, dense.total_together_ms / row.total_together_ms)
        table.add_row(
            row.rate,
            row.reducer,
            settings,
            f"{row.density:.1e}",
            f"{row.num_collectives:g}",
            *(f"{value:.1f}" for value in (*times, *ratios)),
        )
    console = Console(width=150)
    console.print(table)
    console.print("milliseconds; one worker computing at a time, or (*) all at once on this machine's cores")
    console.print(
        f"x: times as fast as exact; other work kept {max(r.other_cores for r in rows):.2f} cores busy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="resnet18")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], metavar="RATE", type=_rate)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of objects")
    arguments = parser.parse_args()
    with Path("/tmp/sage-virtual-cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one such cluster a machine; the tests take it too
        subprocess.run([TOOL, "up", str(NUM_HOSTS)], check=True)
        try:
            numbered = enumerate(arguments.rates)
            rows = [
                row for index, rate in numbered for row in run_group(arguments.layout, rate, 23460 + index)
            ]
        finally:
            subprocess.run([TOOL, "down"], check=True)
    show(rows)
    if arguments.json:
        write_text(arguments.json, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _rate(text: str) -> str:
    if text[-4:] not in BITS or not text[:-4].isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number with mbit or gbit, as in 100mbit, got {text!r}")
    return text


if __name__ == "__main__":
    main()
