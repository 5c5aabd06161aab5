"""What an exchange costs a training step: flat, after backward, or overlapped with it; over slow links.

    python -m benchmarks.overlap [--hosts 2 4] [--rate 1gbit] [--data DIR] [--json FILE]

ResNet-18 on CIFAR-10's images, one worker with one thread on each host of the virtual cluster (tests/cluster;
needs root and what tests/cluster/virtual-cluster names), gloo. All ways take turns: in a round each makes one
step, beginning with another one than in the round before. A step takes as long as its slowest worker.

- step: milliseconds of a whole step: forward, backward, exchange, optimizer. Median (least to most).
- exposed: what the exchange adds: the step minus that of the same model without any exchange, in the same
  round. Median (least to most).

Ways: flat is reducers.attach; hook is reducers.hook; DDP, and torch's hooks, are DistributedDataParallel's
own all-reduce and the communication hooks that come with torch. Buckets are DDP's own (25 MiB), but one for
torch's PowerSGD, whose collectives of several buckets meet in different orders over gloo. BatchNorm's
statistics are not synchronized; batches are small so that a step takes less than a second on one core. All
workers run on this machine's cores: where there are fewer of them than workers and their exchanging threads
need, an overlapped exchange takes time from backward that it would not take on a host of its own.

At the end two processes on the loopback compare `exact` through our hook with plain DDP, which does the same:
what the hook itself costs. other_cores: how many of the machine's cores other work kept busy meanwhile.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command import make_parser
from benchmarks.group import run_workers
from benchmarks.machine import load_average, machine
from benchmarks.network import link_rate, run_on_hosts, virtual_cluster
from benchmarks.overlap_worker import LOOPBACK, Row, Spread
from sage.files import write_json
from tasks.data.cifar import CIFAR10

WORKER = "benchmarks.overlap_worker"


def print_table(rows: Sequence[Row]) -> None:
    console = Console(width=130)
    for (hosts, rate), group in groupby(rows, key=lambda row: (row.hosts, row.rate)):
        table = Table("exchange", "way", "settings", "density", title=f"{hosts} workers, {rate}")
        for name in ("payload, MB", "step, ms", "exposed, ms", "step / DDP's"):
            table.add_column(name, justify="right")
        for row in group:
            table.add_row(*cells_of(row))
        console.print(table)
    console.print(f"other work kept {max(row.other_cores for row in rows):.2f} cores busy")


def cells_of(row: Row) -> list[str]:
    settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
    return [
        row.exchange,
        row.way,
        settings,
        "" if row.density is None else f"{row.density:.1e}",
        "" if row.payload_bytes is None else f"{row.payload_bytes / 1e6:.2f}",
        text_of(row.step_ms, 0),
        "" if row.exposed_ms is None else text_of(row.exposed_ms, 0),
        text_of(row.times_ddp, 3),
    ]


def text_of(spread: Spread, digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in spread)
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2], metavar="W")
    parser.add_argument("--rate", type=link_rate, default="1gbit")
    parser.add_argument("--batch", type=int, default=4, help="images a worker and step")
    parser.add_argument("--rounds", type=int, default=12, help="measured; 3 more warm up")
    parser.add_argument("--loopback-rounds", type=int, default=40, help="0: without this part")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    arguments = parser.parse_args()
    try:
        CIFAR10.check(arguments.data)
    except ValueError as error:
        parser.error(f"--data: {error}")
    facts, rows = machine(), list[Row]()
    given = ["--data", str(arguments.data.absolute()), "--batch", str(arguments.batch)]
    with virtual_cluster(max(arguments.hosts)):
        for port, hosts in enumerate(arguments.hosts, 23480):
            options = ["--rounds", str(arguments.rounds), "--rate", arguments.rate]
            options += ["--address", f"10.77.0.1:{port}", *given]
            rows += run_on_hosts(WORKER, options, hosts, arguments.rate, Row)
    if arguments.loopback_rounds:
        options = ["--rounds", str(arguments.loopback_rounds), "--rate", LOOPBACK, *given]
        rows += run_workers(WORKER, options, 2, Row)
    print_table(rows)
    if arguments.json:
        after = {"load_average_after": load_average()}
        write_json(arguments.json, {**facts, **after, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
