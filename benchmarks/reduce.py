"""How long a reducer's step takes, as a multiple of the floor: memory += gradient on the same n elements.

    python -m benchmarks.reduce [--layout resnet18|lstm] [--world-sizes 1 2] [--reducers NAME,...]
                                [--density 0.001] [--json FILE]

All reducers and the floor take turns in one run (interleaved), with one thread a process. Each reducer has
error feedback with a memory of its own; the figures are medians. The gradients are heavy-tailed (Student's t,
3 degrees of freedom), as in networks; each tensor has a scale of its own, and steps differ. The hard
threshold's constant and SAGE's first threshold are fitted beforehand so that the density is about the target
in the measured steps: the two are compared where they select as much. The table shows the mean density of the
measured steps beside the time, and the compression error of the step after them: the squared norm of what was
not sent, divided by that of what was to be sent.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import reducers
from benchmarks.command import make_parser
from benchmarks.group import add_worker_options, process_group, return_rows, run_workers, write_rows
from reducers import REDUCERS
from sage.exchange.comm import CountingComm, LocalComm, connect_comm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.interfaces import Communicator, Progress, Seeds, Slot, lay_out
from tasks.models.resnet import resnet18

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in REDUCERS},
    "exact-bfloat16": ("exact", {"dtype": "bfloat16"}),
    "powersgd-alternating": ("powersgd", {"form": "alternating"}),
    "accordion-powersgd": ("accordion", {"inner": "powersgd"}),
}
"""What is measured, by label: a reducer and its settings. Density and threshold are added to them."""
NUM_WARM_UP, NUM_MEASURED = 8, 15
CPU = torch.device("cpu")
NUM_GRADIENTS = 5
"""How many gradients are kept in memory; signs drawn for each step make a new one of them."""


def resnet18_layout() -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in resnet18(10).parameters()]


def lstm_layout() -> list[tuple[int, ...]]:
    """Three layers of 650 units, a tied embedding of 28,869 types, a decoder bias: 28,949,319 parameters."""
    layers = [shape for _ in range(3) for shape in ((2600, 650), (2600, 650), (2600,), (2600,))]
    return [(28869, 650), *layers, (28869,)]


LAYOUTS = {"resnet18": resnet18_layout, "lstm": lstm_layout}


@dataclass(frozen=True)
class Row:
    reducer: str
    n: int
    world_size: int
    milliseconds: float
    ratio_to_floor: float
    density: float
    payload_bytes: float
    compression_error: float | None


class Gradients:
    """A worker's gradients (n,): a new one each step, without the cost of drawing n numbers each time."""

    def __init__(self, layout: list[Slot], rank: int, device: torch.device = CPU) -> None:
        rng = torch.Generator(device).manual_seed(1000 + rank)
        n, on_device = layout[-1].stop, dict[str, Any](generator=rng, device=device)
        scale = torch.empty(n, device=device)
        for slot in layout:
            scale[slot.start : slot.stop] = 10 ** (torch.rand((), **on_device) - 3)
        self._pool = []
        for _ in range(NUM_GRADIENTS):
            # Student's t with 3 degrees of freedom: normal / sqrt(chi-squared(3) / 3).
            chi = torch.randn(3, n, **on_device).square_().sum(0)
            self._pool.append(torch.randn(n, **on_device) / (chi / 3).sqrt() * scale)
        self.device, self._on_device = device, on_device

    def fill(self, grad: Tensor) -> None:
        """Fill grad (n,) with a kept gradient, each block of 64 with a random sign: none comes twice."""
        chosen = self._pool[int(torch.randint(NUM_GRADIENTS, (), **self._on_device))]
        blocks = -(-grad.numel() // 64)
        signs = torch.randint(2, (blocks,), **self._on_device).float().mul_(2).sub_(1)
        torch.mul(chosen, signs.repeat_interleave(64)[: grad.numel()], out=grad)


PROGRESS = Progress(epoch=0.0, step=0, lr=0.1, steps_per_epoch=1)
"""Schedules stay at their first epoch."""


@dataclass
class Entry:
    """An exchange under measurement, and what was measured."""

    exchange: Exchange
    comm: CountingComm
    seconds: list[float]
    densities: list[float]

    def step(self, grad: Tensor) -> None:
        started = time.perf_counter()
        self.exchange.average(grad, PROGRESS)
        self.seconds.append(time.perf_counter() - started)
        self.densities.append(self.exchange.reducer.density)

    def compression_error(self, grad: Tensor) -> float | None:
        """||send - sent||^2 / ||send||^2 of one more step; None where what is left in send is no error."""
        norms = self.exchange.average(grad, PROGRESS, measure=True)
        assert norms is not None
        return norms.read().get("compression_error")


def fit_threshold(layout: list[Slot], gradients: Gradients, density: float) -> float:
    """Find the constant whose density under error feedback is about the target in the measured steps.

    It is the median of a quantile of |memory + gradient| over these steps; each sends what exceeds its own.
    """
    n, thresholds = layout[-1].stop, []
    grad, memory = torch.empty(n, device=gradients.device), torch.zeros(n, device=gradients.device)
    for _ in range(NUM_WARM_UP + NUM_MEASURED):
        gradients.fill(grad)
        magnitude = memory.add_(grad).abs()
        thresholds.append(magnitude.kthvalue(n - int(density * n)).values.item())
        memory[magnitude > thresholds[-1]] = 0
    return statistics.median(thresholds[NUM_WARM_UP:])


def fit_first_threshold(layout: list[Slot], gradients: Gradients, density: float, constant: float) -> float:
    """Find SAGE's first threshold: the fraction of the constant that brings its density nearest the target.

    The memory is empty at first and fills, and SAGE's alpha raises the threshold with it.
    """
    n, errors = layout[-1].stop, {}
    for fraction in (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12):
        entry = make_entry(
            "sage", layout, density, fraction * constant, LocalComm.alone(), 0, gradients.device
        )
        grad = torch.empty(n, device=gradients.device)
        for _ in range(NUM_WARM_UP + NUM_MEASURED):
            gradients.fill(grad)
            entry.step(grad)
        achieved = statistics.mean(entry.densities[NUM_WARM_UP:])
        errors[abs(math.log(max(achieved, 1e-9) / density))] = fraction * constant
    return errors[min(errors)]


def make_entry(
    label: str,
    layout: list[Slot],
    density: float,
    threshold: float,
    comm: CountingComm,
    rank: int,
    device: torch.device = CPU,
) -> Entry:
    name, changes = VARIANTS[label]
    settings = REDUCERS[name].Settings
    given = {"density": density, "threshold": threshold, "densities": (density, density / 10)}
    config = settings(**{key: given[key] for key in given.keys() & settings.model_fields.keys()}, **changes)
    reducer = reducers.build(config, layout, seeds=Seeds.derive(1, rank), device=device)
    feedback = Residual(ResidualSettings(), torch.zeros(layout[-1].stop, device=device))
    return Entry(Exchange(feedback, reducer, comm, layout), comm, [], [])


def measure(
    names: list[str], layout: list[Slot], density: float, rank: int, world_size: int, side: Communicator
) -> list[Row]:
    """The medians of all reducers and of the floor. side: a communicator that is not measured."""
    n, gradients = layout[-1].stop, Gradients(layout, rank)
    constant, first = fit_thresholds(layout, gradients, density, side)
    entries = {}
    for name in names:
        threshold = first if name == "sage" else constant
        entries[name] = make_entry(name, layout, density, threshold, connect_comm(world_size), rank)
    fresh = torch.empty(n)
    floor = take_turns(list(entries.values()), gradients, fresh, side)
    floor_ms = 1000 * statistics.median(floor[NUM_WARM_UP:])
    rows = [Row("floor", n, world_size, floor_ms, 1.0, 1.0, 0.0, 0.0)]
    return rows + [row_of(name, entry, world_size, floor_ms, fresh) for name, entry in entries.items()]


def fit_thresholds(
    layout: list[Slot], gradients: Gradients, density: float, side: Communicator
) -> tuple[float, float]:
    """The hard threshold and SAGE's first one, as rank 0 finds them."""
    constant = fit_threshold(layout, gradients, density)
    thresholds = torch.tensor([constant, fit_first_threshold(layout, gradients, density, constant)])
    side.broadcast(thresholds)
    constant, first = thresholds.tolist()
    return constant, first


def take_turns(
    entries: Sequence[Entry], gradients: Gradients, fresh: Tensor, side: Communicator
) -> list[float]:
    """Measure every reducer and the floor once a round, interleaved; returns the floor's seconds.

    fresh (n,) holds the gradient of a round, and on return that of the last one.
    """
    grad, memory, floor = torch.empty_like(fresh), torch.zeros_like(fresh), []
    for step in range(NUM_WARM_UP + NUM_MEASURED):
        gradients.fill(fresh)
        for entry in entries:
            if step == NUM_WARM_UP:
                entry.comm.ledger.take()
            grad.copy_(fresh)
            side.all_reduce(torch.zeros(1))  # all workers start a reducer together
            entry.step(grad)
        started = time.perf_counter()
        memory.add_(fresh)
        floor.append(time.perf_counter() - started)
    return floor


def row_of(label: str, entry: Entry, world_size: int, floor_ms: float, grad: Tensor) -> Row:
    """grad (n,): of one more step, for the compression error."""
    milliseconds = 1000 * statistics.median(entry.seconds[NUM_WARM_UP:])
    return Row(
        reducer=label,
        n=grad.numel(),
        world_size=world_size,
        milliseconds=milliseconds,
        ratio_to_floor=milliseconds / floor_ms,
        density=statistics.mean(entry.densities[NUM_WARM_UP:]),
        payload_bytes=entry.comm.ledger.take()["payload_bytes"] / NUM_MEASURED,
        compression_error=entry.compression_error(grad.clone()),
    )


def run_worker(arguments: argparse.Namespace) -> None:
    """Measure in one process of a group."""
    layout = lay_out((str(index), shape) for index, shape in enumerate(LAYOUTS[arguments.layout]()))
    names, world_size = arguments.reducers.split(","), arguments.world_size
    with process_group(arguments):
        comm = connect_comm(world_size)
        rows = measure(names, layout, arguments.density, arguments.rank, world_size, comm)
    return_rows(arguments, rows)


def print_table(rows: list[Row]) -> None:
    table = Table("reducer", "workers", "ms", "x floor", "density", "payload kB", "error")
    for row in rows:
        table.add_row(
            row.reducer,
            str(row.world_size),
            f"{row.milliseconds:.1f}",
            f"{row.ratio_to_floor:.2f}",
            f"{row.density:.2e}",
            f"{row.payload_bytes / 1000:.1f}",
            "" if row.compression_error is None else f"{row.compression_error:.3f}",
        )
    Console().print(table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="resnet18")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2], metavar="W")
    parser.add_argument("--reducers", default=",".join(VARIANTS), metavar="NAME,...")
    parser.add_argument("--density", type=float, default=0.001)
    add_worker_options(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.reducers.split(",")) - set(VARIANTS):
        parser.error(f"--reducers: expected some of {','.join(VARIANTS)}, got {','.join(sorted(unknown))}")
    if arguments.rank is not None:
        run_worker(arguments)
        return
    options = ["--layout", arguments.layout, "--reducers", arguments.reducers]
    options += ["--density", str(arguments.density)]
    rows = []
    for world_size in arguments.world_sizes:
        rows += run_workers("benchmarks.reduce", options, world_size, Row)
    print_table(rows)
    if arguments.json:
        write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
