"""A worker of benchmarks.network: exchanges of all reducers, with all workers at once and one at a time."""

import argparse
import fcntl
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

import reducers
from benchmarks.group import add_worker_options, process_group, return_rows
from benchmarks.reduce import LAYOUTS, PROGRESS, Gradients, fit_first_threshold, fit_threshold
from reducers import REDUCERS
from sage.exchange.comm import DistComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.interfaces import Seeds, Slot, lay_out

BITS = {"mbit": 1e6, "gbit": 1e9}
NUM_HOSTS = 4
NUM_WARM_UP, NUM_MEASURED = 8, 10
NUM_DENSE = 6
"""How many of the last steps the reducers take that send everything or nearly: these only warm up memory."""
DENSITIES = (0.001, 0.01)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("exact", {}),
    ("exact", {"dtype": "bfloat16"}),
    ("powersgd", {"rank": 4}),
    *((name, {"density": density}) for density in DENSITIES for name in ("topk", "threshold", "sage")),
]
"""What is measured: reducers with settings; a reducer that is missing is left out."""


@dataclass(frozen=True)
class Row:
    """together and alone are described in benchmarks.network."""

    reducer: str
    settings: dict[str, Any]
    layout: str
    n: int
    hosts: int
    rate: str
    num_collectives: float
    """In a step."""
    density: float
    """What was achieved, the mean over steps and workers; 1 for a reducer that selects nothing."""
    wire_bytes: float
    model_ms: float
    communication_ms: float
    compression_alone_ms: float
    compression_together_ms: float
    total_alone_ms: float
    total_together_ms: float
    other_cores: float = 0.0
    """How many cores other work kept busy while this rate was measured."""


class ExchangeSeconds(NamedTuple):
    """Of one step."""

    compression: float
    communication: float


class TurnComm(DistComm):
    """A DistComm whose workers can take turns: every collective begins when all are ready, and between
    collectives one worker of the machine computes at a time."""

    def __init__(self, lock: TextIO) -> None:
        super().__init__()
        self._lock, self._taking_turns = lock, False
        self._seconds, self._waited = 0.0, 0.0

    @contextmanager
    def around_collective(self) -> Iterator[None]:
        """Let others compute, begin when all are ready, end when all have the result."""
        if self._taking_turns:
            started = time.perf_counter()
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            dist.barrier()
            self._waited += time.perf_counter() - started
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
        if self._taking_turns:
            started = time.perf_counter()
            dist.barrier()
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._waited += time.perf_counter() - started

    def step(self, exchange: Exchange, grad: Tensor, *, alone: bool) -> ExchangeSeconds:
        """Time one exchange through this communicator; alone: while the workers take turns."""
        self._taking_turns, self._waited, self._seconds = alone, 0.0, 0.0
        dist.barrier()
        if alone:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        started = time.perf_counter()
        exchange.average(grad, PROGRESS)
        elapsed = time.perf_counter() - started
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return ExchangeSeconds(elapsed - self._waited - self._seconds, self._seconds)


@dataclass
class Entry:
    """An exchange under measurement, and what was measured."""

    name: str
    settings: dict[str, Any]
    exchange: Exchange
    comm: TurnComm
    first_step: int
    """It takes no part in the steps before."""
    alone: list[ExchangeSeconds] = field(default_factory=list)
    together: list[ExchangeSeconds] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)

    def take_step(self, step: int, grad: Tensor) -> None:
        """Make one exchange, every second one alone; after the warm-up it counts."""
        if step == NUM_WARM_UP:
            self.comm.ledger.take()
        is_alone = step % 2 == 0
        seconds = self.comm.step(self.exchange, grad, alone=is_alone)
        if step >= NUM_WARM_UP:
            (self.alone if is_alone else self.together).append(seconds)
            self.densities.append(self.exchange.reducer.density)


def available() -> list[tuple[str, dict[str, Any]]]:
    """The cases whose reducer exists and has those settings."""
    return [
        (name, given)
        for name, given in CASES
        if name in REDUCERS and given.keys() <= REDUCERS[name].Settings.model_fields.keys()
    ]


def fit_thresholds(layout: list[Slot], gradients: Gradients) -> dict[tuple[str, float], float]:
    """The hard threshold and SAGE's first one, by reducer and density. Rank 0 fits them for all."""
    fits = torch.zeros(len(DENSITIES), 2)
    if dist.get_rank() == 0:
        for row, density in zip(fits, DENSITIES, strict=True):
            row[0] = fit_threshold(layout, gradients, density)
            row[1] = fit_first_threshold(layout, gradients, density, row[0].item())
    dist.broadcast(fits, 0)
    pairs = zip(DENSITIES, fits.tolist(), strict=True)
    return {
        (name, density): pair[index]
        for density, pair in pairs
        for index, name in enumerate(("threshold", "sage"))
    }


def make_entries(layout: list[Slot], gradients: Gradients, lock: TextIO) -> list[Entry]:
    thresholds, entries, n = fit_thresholds(layout, gradients), [], layout[-1].stop
    for name, given in available():
        settings = REDUCERS[name].Settings
        density = given.get("density", 1.0)
        chosen = dict(given)
        if (name, density) in thresholds:
            chosen["threshold"] = thresholds[name, density]
        known = {key: value for key, value in chosen.items() if key in settings.model_fields}
        reducer = reducers.build(
            settings(**known), layout, seeds=Seeds.derive(1, dist.get_rank()), device=torch.device("cpu")
        )
        first_step = 0 if density < 1 else NUM_WARM_UP + NUM_MEASURED - NUM_DENSE
        comm = TurnComm(lock)
        exchange = Exchange(Residual(ResidualSettings(), torch.zeros(n)), reducer, comm, layout)
        entries.append(Entry(name, chosen, exchange, comm, first_step))
    return entries


def measure(layout: list[Slot], lock: TextIO) -> list[Entry]:
    """Measure all reducers, which take turns: each makes one exchange in a round."""
    gradients, n = Gradients(layout, dist.get_rank()), layout[-1].stop
    entries = make_entries(layout, gradients, lock)
    grad, fresh = torch.empty(n), torch.empty(n)
    for step in range(NUM_WARM_UP + NUM_MEASURED):
        gradients.fill(fresh)
        for entry in entries:
            if step >= entry.first_step:
                grad.copy_(fresh)
                entry.take_step(step, grad)
    return entries


def slowest(steps: Sequence[tuple[float, float]]) -> Tensor:
    """The milliseconds (steps, 2) of the slowest worker in each step, from the seconds of this worker."""
    milliseconds = 1000 * torch.tensor(steps, dtype=torch.float64)
    dist.all_reduce(milliseconds, dist.ReduceOp.MAX)
    return milliseconds


def row_of(entry: Entry, arguments: argparse.Namespace, n: int) -> Row:
    compression_alone, communication = slowest(entry.alone).median(0).values.tolist()
    totals = [(step.compression, step.compression + step.communication) for step in entry.together]
    compression_together, total_together = slowest(totals).median(0).values.tolist()
    ledger = entry.comm.ledger.take()
    num_steps = len(entry.densities)
    density = torch.tensor(statistics.mean(entry.densities), dtype=torch.float64)
    dist.all_reduce(density)
    wire_bytes = ledger["wire_bytes"] / num_steps
    return Row(
        reducer=entry.name,
        settings=entry.settings,
        layout=arguments.layout,
        n=n,
        hosts=NUM_HOSTS,
        rate=arguments.rate,
        num_collectives=ledger["num_collectives"] / num_steps,
        density=density.item() / NUM_HOSTS,
        wire_bytes=wire_bytes,
        model_ms=1000 * 8 * wire_bytes / bits_a_second(arguments.rate),
        communication_ms=communication,
        compression_alone_ms=compression_alone,
        compression_together_ms=compression_together,
        total_alone_ms=compression_alone + communication,
        total_together_ms=total_together,
    )


def bits_a_second(rate: str) -> float:
    number, unit = rate[:-4], rate[-4:]
    return float(number) * BITS[unit]


def run_worker(arguments: argparse.Namespace) -> None:
    """Measure in one process of a group, on its host."""
    layout = lay_out((str(index), shape) for index, shape in enumerate(LAYOUTS[arguments.layout]()))
    lock_path = arguments.out.with_suffix(".lock")
    with process_group(arguments, arguments.address, minutes=10), lock_path.open("w") as lock:
        rows = [row_of(entry, arguments, layout[-1].stop) for entry in measure(layout, lock)]
    return_rows(arguments, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--layout", "--rate", "--address"):
        parser.add_argument(name)
    add_worker_options(parser)
    run_worker(parser.parse_args())


if __name__ == "__main__":
    main()
