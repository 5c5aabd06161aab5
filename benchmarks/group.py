"""A benchmark's measurement in fresh processes, which form a group where there are several."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sage.files import write_text


def add_hidden(parser: argparse.ArgumentParser) -> None:
    """What run_group tells its processes; without a rank the process is the user's."""
    for name in ("--rank", "--world-size"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """In the group of the processes that were started together, with one thread."""
    torch.set_num_threads(1)
    if arguments.world_size == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.out}.rendezvous",
        rank=arguments.rank,
        world_size=arguments.world_size,
        timeout=timedelta(minutes=5),
    )
    yield
    dist.destroy_process_group()


def hand_in(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rank 0's rows are the group's."""
    if arguments.rank == 0:
        write_text(arguments.out, json.dumps(rows))


def run_group(module: str, words: Sequence[str], world_size: int) -> list[dict[str, Any]]:
    """The rows of `python -m MODULE WORDS` in world_size processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, *words, "--out", str(out), "--world-size", str(world_size)]
        processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world_size)]
        if any([process.wait() for process in processes]):  # every one is waited for
            raise SystemExit(f"{module}: a worker failed")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows
