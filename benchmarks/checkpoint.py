"""What it costs that nothing is lost: a checkpoint, going on from it, and the check of every step.

    python -m benchmarks.checkpoint [--folder DIR]

For the sizes of ResNet-18 (SGD with momentum) and NeuMF on MovieLens 20M (Adam), with SAGE and its residual,
for one worker and for two processes over gloo: seconds until a checkpoint is on the disk (fsync) of --folder,
bytes of its files, seconds to read it back; and the milliseconds of one step's check (the gradient's sum, one
all-reduce of 4 bytes), also as a multiple of the floor `memory += gradient`. Medians, with the range.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.group import add_hidden, hand_in, joined, run_group
from benchmarks.machine import machine
from reducers import REDUCERS
from sage.exchange.comm import connect_comm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.exchange.gradient import GradientBuffer
from sage.files import write_text
from sage.interfaces import Place, Seeds
from sage.runfolder import manifest
from sage.runfolder.checkpoint import Checkpoints, CheckpointWriter, read_state
from sage.training.agree import Agreement, wait_for_all
from sage.training.optim import SGD, Adam, build_optimizer
from sage.training.state import Position, TrainingState
from sage.workers.store import RendezvousStore
from tasks.models.neumf import NeuMF
from tasks.models.resnet import resnet18

NUM_SAVES, NUM_CHECKS = 7, 60


@dataclass(frozen=True)
class Row:
    """Seconds and milliseconds are rank 0's: median, least, most."""

    size: str
    n: int
    world_size: int
    shared_bytes: int
    worker_bytes: int
    save_seconds: tuple[float, float, float]
    load_seconds: tuple[float, float, float]
    check_milliseconds: tuple[float, float, float]
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
    writer = CheckpointWriter(
        folder, {}, Checkpoints(keep=1), RendezvousStore(Place(rank, world_size), store)
    )
    steps = iter(range(1, NUM_SAVES + 1))

    def save() -> None:
        shared = state.shared() if rank == 0 else None
        writer.save(next(steps), 0, shared, state.own(), sync=lambda: None)

    def wait() -> None:
        wait_for_all(side, device)

    saved = seconds_of(save, NUM_SAVES, wait)

    def load() -> None:
        checkpoint = manifest.newest(folder)  # anew: it hashes a file when it is read first
        state.load_shared(read_state(checkpoint, manifest.SHARED), with_optimizer=True)
        state.load_own(read_state(checkpoint, manifest.worker_file(rank)))

    loaded = seconds_of(load, 3, wait)
    agreement, loss = Agreement(side, device, lambda: False), torch.zeros(())
    used = [True] * len(gradient.layout)
    checked = seconds_of(lambda: agreement.agree(loss + gradient.flat.sum(), used), NUM_CHECKS, wait)
    floor = seconds_of(lambda: feedback.memory.add_(gradient.flat), NUM_CHECKS, wait)
    files = manifest.newest(folder).manifest.files
    return Row(
        size,
        gradient.flat.numel(),
        world_size,
        files[manifest.SHARED].bytes,
        files[manifest.worker_file(0)].bytes,
        saved,
        loaded,
        (1000 * checked[0], 1000 * checked[1], 1000 * checked[2]),
        checked[0] / floor[0],
    )


def seconds_of(
    call: Callable[[], object], count: int, wait: Callable[[], object]
) -> tuple[float, float, float]:
    """Of one call, the first left out, each begun by all workers together: median, least, most."""
    taken = []
    for _ in range(count):
        wait()
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]), min(taken[1:]), max(taken[1:])


def worker(arguments: argparse.Namespace) -> None:
    rows = []
    with joined(arguments):
        world_size = arguments.world_size
        files = dist.FileStore(f"{arguments.out}.store", world_size) if world_size > 1 else None
        for size in SIZES:
            folder = arguments.folder / f"{size}-{world_size}"
            store = dist.PrefixStore(size, files) if files else None
            rows.append(asdict(measure(size, folder, arguments.rank, world_size, store)))
    hand_in(arguments, rows)


def show(rows: list[Row]) -> None:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2], metavar="W")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and what machine it was")
    add_hidden(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        worker(arguments)
        return
    facts, folder = machine(), Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        words = ["--folder", str(folder)]
        found = [row for w in arguments.world_sizes for row in run_group("benchmarks.checkpoint", words, w)]
    finally:
        shutil.rmtree(folder)
    show([Row(**row) for row in found])
    if arguments.json:
        write_text(arguments.json, json.dumps({**facts, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
