"""A worker of benchmarks.network: every reducer's exchange in turn, all at once and one at a time."""

import argparse
import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

import reducers
from benchmarks.reduce import LAYOUTS, PROGRESS, Gradients, fitting_start, fitting_threshold
from reducers import REDUCERS
from sage.exchange.comm import DistComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.files import write_text
from sage.interfaces import Seeds, Slot, lay_out

BITS = {"mbit": 1e6, "gbit": 1e9}
NUM_HOSTS = 4
NUM_WARM_UP, NUM_MEASURED = 8, 10
NUM_DENSE = 6
"""Steps of the reducers that send everything or nearly; they have nothing to warm up but memory."""
DENSITIES = (0.001, 0.01)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("exact", {}),
    ("exact", {"dtype": "bfloat16"}),
    ("powersgd", {"rank": 4}),
    *((name, {"density": density}) for density in DENSITIES for name in ("topk", "threshold", "sage")),
]
"""What is measured: reducers with settings; those that are not there (yet) are left out."""


@dataclass(frozen=True)
class Row:
    """Seconds are milliseconds here; together and alone as above."""

    reducer: str
    settings: dict[str, Any]
    layout: str
    n: int
    hosts: int
    rate: str
    num_collectives: float
    """In a step."""
    density: float
    """Achieved, mean over steps and workers; 1 for what selects nothing."""
    wire_bytes: float
    model_ms: float
    communication_ms: float
    compression_alone_ms: float
    compression_together_ms: float
    total_alone_ms: float
    total_together_ms: float
    other_cores: float = 0.0
    """Cores that other work kept busy during this rate's measurement."""


class TurnComm(DistComm):
    """Its collectives begin together, and between them one worker of the machine runs at a time, while taking
    turns; otherwise a DistComm."""

    def __init__(self, lock: TextIO) -> None:
        super().__init__()
        self._lock, self._taking_turns = lock, False
        self._seconds, self._waited = 0.0, 0.0

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Around a collective: let the others compute, begin it when all are ready, end when all have it."""
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

    def _call(self, name: str, collective: Any) -> None:
        with self._given_up():
            super()._call(name, collective)

    def step(self, exchange: Exchange, grad: Tensor, *, alone: bool) -> tuple[float, float]:
        """One exchange through this communicator; the seconds of compression and of communication."""
        self._taking_turns, self._waited, self._seconds = alone, 0.0, 0.0
        dist.barrier()
        if alone:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        started = time.perf_counter()
        exchange.average(grad, PROGRESS)
        elapsed = time.perf_counter() - started
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return elapsed - self._waited - self._seconds, self._seconds


@dataclass
class Entry:
    """An exchange under measurement, and what was measured."""

    name: str
    settings: dict[str, Any]
    exchange: Exchange
    comm: TurnComm
    num_steps: int
    seconds: dict[bool, list[tuple[float, float]]] = field(default_factory=lambda: {True: [], False: []})
    """By alone: compression and communication of each step."""
    densities: list[float] = field(default_factory=list)


def available() -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, given)
        for name, given in CASES
        if name in REDUCERS and given.keys() <= REDUCERS[name].Settings.model_fields.keys()
    ]


def fitted(layout: list[Slot], gradients: Gradients) -> dict[tuple[str, float], float]:
    """The hard threshold and SAGE's first one by density: rank 0's, which the others wait for."""
    fits = torch.zeros(len(DENSITIES), 2)
    if dist.get_rank() == 0:
        for row, density in zip(fits, DENSITIES, strict=True):
            row[0] = fitting_threshold(layout, gradients, density)
            row[1] = fitting_start(layout, gradients, density, row[0].item())
    dist.broadcast(fits, 0)
    pairs = zip(DENSITIES, fits.tolist(), strict=True)
    return {
        (name, density): pair[index]
        for density, pair in pairs
        for index, name in enumerate(("threshold", "sage"))
    }


def make_entries(layout: list[Slot], gradients: Gradients, lock: TextIO) -> list[Entry]:
    thresholds, entries, n = fitted(layout, gradients), [], layout[-1].stop
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
        num_steps = NUM_WARM_UP + NUM_MEASURED if density < 1 else NUM_DENSE
        comm = TurnComm(lock)
        exchange = Exchange(Residual(ResidualSettings(), torch.zeros(n)), reducer, comm, layout)
        entries.append(Entry(name, chosen, exchange, comm, num_steps))
    return entries


def measure(layout: list[Slot], lock: TextIO) -> list[Entry]:
    """Interleaved: every reducer once a round, together and alone in turn."""
    gradients, n = Gradients(layout, dist.get_rank()), layout[-1].stop
    entries = make_entries(layout, gradients, lock)
    grad, fresh = torch.empty(n), torch.empty(n)
    for step in range(NUM_WARM_UP + NUM_MEASURED):
        gradients.fill(fresh)
        for entry in entries:
            if step < NUM_WARM_UP + NUM_MEASURED - entry.num_steps:
                continue
            if step == NUM_WARM_UP:
                entry.comm.ledger.take()
            grad.copy_(fresh)
            alone = step % 2 == 0
            seconds = entry.comm.step(entry.exchange, grad, alone=alone)
            if step >= NUM_WARM_UP:
                entry.seconds[alone].append(seconds)
                entry.densities.append(entry.exchange.reducer.density)
    return entries


def slowest(steps: list[tuple[float, ...]]) -> Tensor:
    """Each step's milliseconds (steps, parts): of its slowest worker."""
    milliseconds = 1000 * torch.tensor(steps, dtype=torch.float64)
    dist.all_reduce(milliseconds, dist.ReduceOp.MAX)
    return milliseconds


def row_of(entry: Entry, arguments: argparse.Namespace, n: int) -> Row:
    alone = slowest([(a, b) for a, b in entry.seconds[True]]).median(0).values.tolist()
    together = slowest([(a, a + b) for a, b in entry.seconds[False]]).median(0).values.tolist()
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
        communication_ms=alone[1],
        compression_alone_ms=alone[0],
        compression_together_ms=together[0],
        total_alone_ms=sum(alone),
        total_together_ms=together[1],
    )


def bits_a_second(rate: str) -> float:
    number, unit = rate[:-4], rate[-4:]
    return float(number) * BITS[unit]


def worker(arguments: argparse.Namespace) -> None:
    """One process on its host: joins the group, measures; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{arguments.meeting}",
        rank=arguments.rank,
        world_size=NUM_HOSTS,
        timeout=timedelta(minutes=10),
    )
    layout = lay_out((str(index), shape) for index, shape in enumerate(LAYOUTS[arguments.layout]()))
    with arguments.out.with_suffix(".lock").open("w") as lock:
        rows = [row_of(entry, arguments, layout[-1].stop) for entry in measure(layout, lock)]
    if arguments.rank == 0:
        write_text(arguments.out, json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--layout", "--rate", "--meeting"):
        parser.add_argument(name)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--out", type=Path)
    worker(parser.parse_args())


if __name__ == "__main__":
    main()
