"""How many images, tokens or interactions a second a task delivers, without model and optimizer.

    python -m benchmarks.data [--tasks NAME,...] [--data data] [--seconds 1.0] [--json FILE]

One worker on the CPU with one thread takes the batches of a task with its default settings, epoch after
epoch; what an epoch does before its first batch is counted too. The tasks take turns for several rounds. The
table shows the median of the rounds, the slowest and the fastest, and the rate per second of processor time,
which other programs disturb less.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import make_parser
from benchmarks.machine import load_average, machine
from sage.files import write_json
from sage.interfaces import Place, Seeds, Task
from tasks import TASKS

NUM_ROUNDS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Feed:
    """What a task's batches hold, and how to count it in one."""

    items: str
    number_in: Callable[[Any], int]


IMAGES = Feed("images", lambda batch: len(batch[1]))
TOKENS = Feed("tokens", lambda batch: batch[1].numel())
INTERACTIONS = Feed("interactions", lambda batch: len(batch[2]))

FEEDS: dict[str, Feed] = {
    "cifar10": IMAGES,
    "cifar100": IMAGES,
    "digits": IMAGES,
    "wikitext2": TOKENS,
    "python_docs": TOKENS,
    "ml-100k": INTERACTIONS,
    "synthetic_ratings": INTERACTIONS,
}
"""The tasks that are measured."""


@dataclass(frozen=True)
class Row:
    task: str
    items: str
    items_per_batch: float
    items_per_second: float
    slowest: float
    fastest: float
    items_per_processor_second: float


class Measurement:
    """A task whose batches are taken in rounds, and the rates of the rounds."""

    def __init__(self, name: str, data: Path) -> None:
        settings = TASKS[name].Settings()
        TASKS[name].check(settings, data, world_size=1)
        self.name, self.feed = name, FEEDS[name]
        task = TASKS[name](settings, data, Place(0, 1), seeds=Seeds.derive(1, 0), device=CPU)
        self._batches = endless_batches(task)
        self._sizes: list[int] = []
        self._rates: list[float] = []
        self._processor_rates: list[float] = []

    def take(self, seconds: float, *, keep: bool) -> None:
        """Take batches for at least so many seconds: one round, which counts where keep is true."""
        sizes: list[int] = []
        started, processor = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - started) < seconds or not sizes:
            sizes.append(self.feed.number_in(next(self._batches)))
        if keep:
            self._sizes += sizes
            self._rates.append(sum(sizes) / passed)
            self._processor_rates.append(sum(sizes) / (time.process_time() - processor))

    def row(self) -> Row:
        return Row(
            self.name,
            self.feed.items,
            statistics.mean(self._sizes),
            statistics.median(self._rates),
            min(self._rates),
            max(self._rates),
            statistics.median(self._processor_rates),
        )


def endless_batches(task: Task) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    for epoch in count():
        yield from task.train_batches(epoch)


def with_data(names: list[str], data: Path) -> Iterator[Measurement]:
    """The tasks whose data is there. For others, stderr says which command prepares it."""
    for name in names:
        try:
            yield Measurement(name, data)
        except ValueError as error:
            Console(stderr=True, soft_wrap=True).print(f"left out: {error}", highlight=False)


def measure(names: list[str], data: Path, seconds: float) -> list[Row]:
    """Measure the tasks whose data is there, in rounds."""
    torch.set_num_threads(1)
    measurements = list(with_data(names, data))
    for measurement in measurements:
        measurement.take(seconds / 4, keep=False)
    for _ in range(NUM_ROUNDS):
        for measurement in measurements:
            measurement.take(seconds, keep=True)
    return [measurement.row() for measurement in measurements]


def print_table(rows: list[Row]) -> None:
    table = Table("task", "items", "a batch", "a second", "slowest", "fastest", "a processor second")
    for row in rows:
        rates = (row.items_per_second, row.slowest, row.fastest, row.items_per_processor_second)
        table.add_row(row.task, row.items, f"{row.items_per_batch:,.0f}", *(f"{rate:,.0f}" for rate in rates))
    Console().print(table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", default=",".join(FEEDS), metavar="NAME,...")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round; there are 5 rounds")
    arguments = parser.parse_args()
    names = arguments.tasks.split(",")
    if unknown := set(names) - set(FEEDS):
        parser.error(f"--tasks: expected some of {','.join(FEEDS)}, got {','.join(sorted(unknown))}")
    facts = machine()
    rows = measure(names, arguments.data, arguments.seconds)
    print_table(rows)
    if arguments.json:
        content = {**facts, "load_average_after": load_average(), "rows": [asdict(row) for row in rows]}
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()
