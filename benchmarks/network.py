"""How long a step's exchange takes over slow links: four hosts of the virtual cluster (tests/cluster), gloo.

    python -m benchmarks.network [--layout resnet18|lstm] [--rates 100mbit 1gbit] [--json FILE]

Needs root and what tests/cluster/virtual-cluster names. Each host runs one worker with one thread, all on
this machine's cores. All reducers take turns. Steps are measured in two ways, in turn:

- together: all workers compute at once. With fewer cores than workers, a worker's compression also waits for
  a core, and its collectives wait for the others.
- alone: one worker computes at a time, and every collective begins when all workers are ready. So
  compression and communication are those of hosts with a core for each worker; total is their sum.

A step takes as long as its slowest worker; the figures are medians over steps. The column `model` is the
ledger's wire_bytes divided by the link's rate. The link lets a burst of 256 kB pass at once (tc's tbf):
messages of about that size can be faster than the model. The gradients are those of benchmarks.reduce, and
SAGE's first threshold and the hard threshold are fitted to the target density as there. other_cores says how
many of the machine's cores other work kept busy meanwhile: repeat a measurement that had much beside it.
"""

import argparse
import fcntl
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command import make_parser
from benchmarks.group import Row, run_workers, write_rows
from benchmarks.network_worker import BITS, NUM_HOSTS
from benchmarks.network_worker import Row as Exchanged
from benchmarks.reduce import LAYOUTS

ROOT = Path(__file__).parent.parent
CLUSTER = str(ROOT / "tests" / "cluster" / "virtual-cluster")


def busy_seconds() -> tuple[float, float]:
    """The processor seconds of the whole machine so far, and those of this program's workers that ended."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK"), used.ru_utime + used.ru_stime


def on_host(rank: int) -> list[str]:
    """The words before a command that run it on the host of a rank."""
    return [CLUSTER, "on", f"n{rank + 1}"]


def run_on_hosts(
    module: str, options: Sequence[str], num_hosts: int, rate: str, row_type: Callable[..., Row]
) -> list[Row]:
    """The rows of fresh processes, one on each host, with links of this rate; with other_cores, which the
    rows have."""
    subprocess.run([CLUSTER, "rate", rate], check=True)
    started, (machine, own) = time.monotonic(), busy_seconds()
    rows = run_workers(module, options, num_hosts, row_type, prefix=on_host)
    machine_now, own_now = busy_seconds()
    others = (machine_now - machine - (own_now - own)) / (time.monotonic() - started)
    return [replace(row, other_cores=others) for row in rows]  # type: ignore[type-var]


@contextmanager
def virtual_cluster(num_hosts: int) -> Iterator[None]:
    """While in here there are hosts n1 ... of the virtual cluster."""
    with Path("/tmp/sage-virtual-cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a machine has one such cluster; the tests use it too
        subprocess.run([CLUSTER, "up", str(num_hosts)], check=True)
        try:
            yield
        finally:
            subprocess.run([CLUSTER, "down"], check=True)


def print_table(rows: list[Exchanged]) -> None:
    exact = {row.rate: row for row in rows if row.reducer == "exact" and not row.settings}
    table = Table("link", "reducer", "settings", "density", "collectives")
    for name in ("model", "communication", "compression", "total", "compression*", "total*", "x", "x*"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*cells_of(row, exact[row.rate]))
    console = Console(width=150)
    console.print(table)
    console.print("milliseconds; one worker computing at a time, or (*) all at once on this machine's cores")
    console.print(
        f"x: times as fast as exact; other work kept {max(r.other_cores for r in rows):.2f} cores busy"
    )


def cells_of(row: Exchanged, exact: Exchanged) -> list[str]:
    """exact: the row that the total times are compared with."""
    settings = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.settings.items()
    )
    numbers = (
        row.model_ms,
        row.communication_ms,
        row.compression_alone_ms,
        row.total_alone_ms,
        row.compression_together_ms,
        row.total_together_ms,
        exact.total_alone_ms / row.total_alone_ms,
        exact.total_together_ms / row.total_together_ms,
    )
    first = [row.rate, row.reducer, settings, f"{row.density:.1e}", f"{row.num_collectives:g}"]
    return [*first, *(f"{number:.1f}" for number in numbers)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="resnet18")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], metavar="RATE", type=link_rate)
    arguments = parser.parse_args()
    rows: list[Exchanged] = []
    with virtual_cluster(NUM_HOSTS):
        for port, rate in enumerate(arguments.rates, 23460):
            options = ["--layout", arguments.layout, "--rate", rate, "--address", f"10.77.0.1:{port}"]
            rows += run_on_hosts("benchmarks.network_worker", options, NUM_HOSTS, rate, Exchanged)
    print_table(rows)
    if arguments.json:
        write_rows(arguments.json, rows)


def link_rate(text: str) -> str:
    """Of the command line."""
    if text[-4:] not in BITS or not text[:-4].isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number with mbit or gbit, as in 100mbit, got {text!r}")
    return text


if __name__ == "__main__":
    main()
