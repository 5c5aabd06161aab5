"""Runs a benchmark's measurement in fresh processes, one for each worker, and collects its rows."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sage.files import write_text

Row = TypeVar("Row")


def run_workers(
    module: str,
    options: Sequence[str],
    world_size: int,
    row_type: Callable[..., Row],
    prefix: Callable[[int], list[str]] = lambda rank: [],
) -> list[Row]:
    """Run `python -m MODULE OPTIONS` in world_size processes and return the rows that they measured.

    prefix: of a rank, the words of a command that runs its process, on another host say. Exits where a worker
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, *options, "--out", str(out), "--world-size", str(world_size)]
        processes = [
            subprocess.Popen([*prefix(rank), *command, "--rank", str(rank)]) for rank in range(world_size)
        ]
        if any([process.wait() for process in processes]):  # a list: waits for all, also after a failure
            raise SystemExit(f"{module}: a worker failed")
        return [row_type(**row) for row in json.loads(out.read_text())]


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that run_workers gives its processes. Without --rank, a user started the process."""
    for name in ("--rank", "--world-size"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


@contextmanager
def process_group(arguments: argparse.Namespace, address: str = "", minutes: float = 5) -> Iterator[None]:
    """Join the group of the processes that were started together; a single worker needs none.

    address: where they meet; without one they are on one machine and meet at a file. Sets one thread.
    """
    torch.set_num_threads(1)
    if arguments.world_size == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}" if address else f"file://{arguments.out}.rendezvous",
        rank=arguments.rank,
        world_size=arguments.world_size,
        timeout=timedelta(minutes=minutes),
    )
    yield
    dist.destroy_process_group()


def return_rows(arguments: argparse.Namespace, rows: Sequence[Any]) -> None:
    """Give rank 0's rows to the process that runs the workers; the others' are dropped."""
    if arguments.rank == 0:
        write_rows(arguments.out, rows)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write rows, which are dataclasses, as a JSON list of objects."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
