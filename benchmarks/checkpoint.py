"""What it costs to lose nothing: saving a checkpoint, reading it back, and the check before every exchange.

    python -m benchmarks.checkpoint [--folder DIR]

For the sizes of ResNet-18 (SGD with momentum) and NeuMF on MovieLens 20M (Adam), with SAGE and its residual,
for one worker and for two processes over gloo: seconds until a checkpoint is on the disk (fsync) of --folder,
bytes of its files, seconds to read it back; and the milliseconds of one step's check (the gradient's sum, one
all-reduce of 4 bytes), also as a multiple of the floor `memory += gradient`. Medians, with the range.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.command import make_parser
from benchmarks.group import add_worker_options, process_group, return_rows, run_workers
from benchmarks.machine import machine
from reducers import REDUCERS
from sage.exchange.comm import connect_comm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.exchange.gradient import GradientBuffer
from sage.files import write_json
from sage.interfaces import Place, Seeds
from sage.runfolder import manifest
from sage.runfolder.checkpoint import Checkpoints, CheckpointWriter, read_state
from sage.training.agree import Agreement, Evidence, wait_for_all
from sage.training.optim import SGD, Adam, build_optimizer
from sage.training.state import Position, TrainingState
from sage.workers.store import RendezvousStore
from tasks.models.neumf import NeuMF
from tasks.models.resnet import resnet18

NUM_SAVES, NUM_LOADS, NUM_CHECKS = 7, 3, 60


class Times(NamedTuple):
    """Of several calls."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """The times are rank 0's."""

    size: str
    n: int
    world_size: int
    shared_bytes: int
    worker_bytes: int
    save_seconds: Times
    load_seconds: Times
    check_milliseconds: Times
    check_ratio_to_floor: float


def build(size: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    if size == "resnet18":
        model: nn.Module = resnet18(10)
        return model, build_optimizer(SGD(lr=0.1, momentum=0.9, weight_decay=5e-4), model)
    model = NeuMF(138_493, 26_744, factors=64, widths=(256, 256, 128, 64), dropout=0.5)
    return model, build_optimizer(Adam(lr=0.0045), model)


SIZES = ("resnet18", "ncf_ml-20m")


def measure(size: str, folder: Path, rank: int, world_size: int, store: dist.Store | None) -> Row:
    model, optimizer = build(size)
    gradient, device = GradientBuffer(model), torch.device("cpu")
    sage = REDUCERS["sage"]
    reducer = sage(sage.Settings(density=0.001), gradient.layout, seeds=Seeds.derive(1, rank), device=device)
    feedback = Residual(ResidualSettings(), gradient.flat)
    side = connect_comm(world_size)
    exchange = Exchange(feedback, reducer, side, gradient.layout)
    gradient.flat.normal_()
    feedback.memory.normal_()
    optimizer.step()  # fills its state
    state = TrainingState(model, optimizer, Position(1), {"exchange": exchange}, device)
    folder.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(
        folder, {}, Checkpoints(keep=1), RendezvousStore(Place(rank, world_size), store)
    )

    def wait() -> None:
        wait_for_all(side, device)

    saved, loaded = time_files(state, writer, folder, rank, wait)
    agreement, loss = Agreement(side, device, lambda: False), torch.zeros(())
    used = [True] * len(gradient.layout)

    def check() -> None:
        evidence = Evidence(0, 0, loss + torch.linalg.vector_norm(gradient.flat))
        agreement.agree(evidence, used, waits=True)

    checked = seconds_of(check, NUM_CHECKS, wait)
    floor = seconds_of(lambda: feedback.memory.add_(gradient.flat), NUM_CHECKS, wait)
    files = manifest.newest(folder).manifest.files
    return Row(
        size=size,
        n=gradient.flat.numel(),
        world_size=world_size,
        shared_bytes=files[manifest.SHARED].bytes,
        worker_bytes=files[manifest.worker_file(0)].bytes,
        save_seconds=saved,
        load_seconds=loaded,
        check_milliseconds=Times(*(1000 * seconds for seconds in checked)),
        check_ratio_to_floor=checked.median / floor.median,
    )


def time_files(
    state: TrainingState, writer: CheckpointWriter, folder: Path, rank: int, wait: Callable[[], object]
) -> tuple[Times, Times]:
    """The seconds of saving a checkpoint, and of reading it back."""
    steps = iter(range(1, NUM_SAVES + 1))

    def save() -> None:
        shared = state.shared() if rank == 0 else None
        writer.save(next(steps), 0, shared, state.own(), sync=lambda: None)

    def load() -> None:
        checkpoint = manifest.newest(folder)  # anew: it hashes a file when it is read first
        state.load_shared(read_state(checkpoint, manifest.SHARED), with_optimizer=True)
        state.load_own(read_state(checkpoint, manifest.worker_file(rank)))

    return seconds_of(save, NUM_SAVES, wait), seconds_of(load, NUM_LOADS, wait)


def seconds_of(call: Callable[[], object], count: int, wait: Callable[[], object]) -> Times:
    """The seconds of a call, which all workers begin together each time; the first time does not count."""
    taken = []
    for _ in range(count):
        wait()
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return Times(statistics.median(taken[1:]), min(taken[1:]), max(taken[1:]))


def run_worker(arguments: argparse.Namespace) -> None:
    """Measure in one process of a group."""
    rows = []
    with process_group(arguments):
        world_size = arguments.world_size
        files = dist.FileStore(f"{arguments.out}.store", world_size) if world_size > 1 else None
        for size in SIZES:
            folder = arguments.folder / f"{size}-{world_size}"
            store = dist.PrefixStore(size, files) if files else None
            rows.append(measure(size, folder, arguments.rank, world_size, store))
    return_rows(arguments, rows)


def print_table(rows: list[Row]) -> None:
    table = Table("size", "n", "workers", "shared", "a worker's", "save s", "load s", "check ms", "x floor")
    for row in rows:
        ranges = [
            f"{median:.3g} ({least:.3g} to {most:.3g})"
            for median, least, most in (row.save_seconds, row.load_seconds, row.check_milliseconds)
        ]
        table.add_row(
            row.size,
            f"{row.n:,}",
            str(row.world_size),
            f"{row.shared_bytes / 1e6:.1f} MB",
            f"{row.worker_bytes / 1e6:.1f} MB",
            *ranges,
            f"{row.check_ratio_to_floor:.2f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2], metavar="W")
    add_worker_options(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_worker(arguments)
        return
    facts, folder = machine(), Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        options, rows = ["--folder", str(folder)], []
        for world_size in arguments.world_sizes:
            rows += run_workers("benchmarks.checkpoint", options, world_size, Row)
    finally:
        shutil.rmtree(folder)
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, {**facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
