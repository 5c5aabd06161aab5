"""From an environment to a running worker: who am I, which device, which process group. The only reader of
os.environ.

One process, for one worker or for all of a simulation; torchrun's variables; or --workers N, which starts N
processes through torch's own elastic launcher.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sage.board import PATIENCE_SECONDS, Board, first_line
from sage.interfaces import CommunicationError, Place, TrainingError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher passes on to its workers; SIGUSR1 is SLURM's warning before the time limit."""


@dataclass(frozen=True)
class Worker:
    """One process of a run, before any process group exists."""

    place: Place
    local_world_size: int
    device: torch.device
    backend: str
    num_threads: int
    data: Path
    """The folder of prepared data sets."""
    simulated: bool = False
    """Whether all workers live in this process, and take turns."""

    def facts(self) -> dict[str, Any]:
        """What environment.json says of all workers alike."""
        return {
            "world_size": self.place.world_size,
            "simulated": self.simulated,
            "backend": self.backend if self.place.world_size > 1 else None,
            "threads_per_worker": self.num_threads,
        }

    def where(self) -> str:
        """The host and the device, for the record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{socket.gethostname()}/{name}"

    def describe(self) -> str:
        """The choices made here, in one line."""
        if self.simulated:
            in_turn = f"{self.place.world_size} simulated workers in turn on {self.device}"
            return f"{in_turn}, {self.num_threads} threads"
        if self.place.world_size == 1:
            return f"1 worker on {self.device}, {self.num_threads} threads"
        sharing = ""
        if self.device.type == "cuda" and self.backend == "gloo":
            sharing = f" ({self.local_world_size} workers share {torch.cuda.device_count()} GPUs)"
        return (
            f"{self.place.world_size} workers over {self.backend} on {self.device.type}{sharing}, "
            f"{self.num_threads} threads each"
        )


def started_by_launcher() -> bool:
    """Whether this process is already one of torchrun's (or of spawn's) workers."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def is_to_spawn(worker: Worker) -> bool:
    """Whether the workers are processes that this one is to start."""
    return worker.place.world_size > 1 and not worker.simulated and not started_by_launcher()


def speaks_here() -> bool:
    """Whether this process is the one of its host that says what is wrong."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return local_rank == "0" or not local_rank.isdecimal()


def find_worker(
    num_threads: int | None, num_workers: int | None, data: Path | None, num_simulated: int | None = None
) -> Worker:
    """This process's worker, by torchrun's variables; else worker 0 of num_workers that are to be started,
    or of num_simulated in this process.

    The data folder is the given one, else SAGE_DATA, else ./data. Raises ValueError where the launcher's
    numbers are none, or are not num_workers, or where a launcher started a simulation.
    """
    environ = os.environ if started_by_launcher() else {}
    if num_simulated is not None and environ:
        raise ValueError(
            f"--simulate: expected one process without a launcher, got one with "
            f"{' and '.join(name for name in ('RANK', 'WORLD_SIZE') if name in environ)} in its environment"
        )
    for name in ("RANK", "WORLD_SIZE"):
        if environ and name not in environ:
            raise ValueError(f"{name}: expected a number from the launcher, got nothing")
    world_size = _number(environ, "WORLD_SIZE", num_workers or num_simulated or 1, low=1)
    if num_workers not in (None, world_size):
        raise ValueError(f"--workers: expected {world_size}, as launched, got {num_workers}")
    rank = _number(environ, "RANK", 0, high=world_size - 1)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size, low=1)
    local_rank = _number(environ, "LOCAL_RANK", 0, high=local_world_size - 1)
    if environ and world_size > 1:
        _number(environ, "MASTER_PORT", -1, low=1, high=65535)
        if not environ.get("MASTER_ADDR"):
            raise ValueError(
                "MASTER_ADDR: expected the address of rank 0's host from the launcher, got nothing"
            )
    num_gpus = torch.cuda.device_count()
    return Worker(
        place=Place(rank, world_size),
        local_world_size=local_world_size,
        device=torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu"),
        backend="threads" if num_simulated else "nccl" if num_gpus >= local_world_size else "gloo",
        num_threads=num_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size),
        data=data or Path(os.environ.get("SAGE_DATA") or "data"),
        simulated=num_simulated is not None,
    )


def _number(environ: Mapping[str, str], name: str, default: int, low: int = 0, high: int = 2**31) -> int:
    """A launcher's variable, or the default where it is not set."""
    text = environ.get(name, str(default))
    if not text.isdecimal() or not low <= int(text) <= high:
        got = repr(text) if name in environ else "nothing"
        raise ValueError(f"{name}: expected a number in [{low}, {high}] from the launcher, got {got}")
    return int(text)


def spawn(command: Sequence[str], num_workers: int, say: Callable[[str], None]) -> int:
    """Run `python COMMAND` in num_workers processes, and return the exit code.

    A command, not a function: each child is a process of its own session, so that Ctrl-C reaches it once,
    through the launcher.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle=SIGNALS,
    )
    for name in list(
        logging.root.manager.loggerDict
    ):  # each has a level of its own; what they log is said below
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        died = failure.exitcode < 0
        how = (
            f"to fail (signal {-failure.exitcode})" if died else f"to give up (exit code {failure.exitcode})"
        )
        say(f"worker {rank} was the first {how}; the run has ended")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        say(f"stopped by {error.sigval.name}; the workers have ended")
        return 128 + int(error.sigval)
    return 0


@contextmanager
def connect(worker: Worker, timeout_seconds: float, *, deterministic: bool) -> Iterator[Board]:
    """Set up this process (threads, device, determinism) and, with several workers, the process group."""
    torch.set_num_threads(worker.num_threads)
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        torch.use_deterministic_algorithms(True)
        # Filling new tensors with NaN costs a pass over each.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if worker.place.world_size == 1 or worker.simulated:
        yield Board(worker.place, None)
        return
    try:
        store = _join_group(worker, timedelta(seconds=timeout_seconds))
    except RuntimeError as error:  # DistError and its kind
        raise CommunicationError(f"could not meet the other workers: {first_line(error)}") from error
    yield Board(worker.place, store, min(timeout_seconds, PATIENCE_SECONDS))
    dist.destroy_process_group()


def _join_group(worker: Worker, timeout: timedelta) -> Store:
    """Set up the default process group; the part of its rendezvous store that is for our own use."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        worker.place.world_size,
        is_master=worker.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    if worker.backend == "nccl":  # a collective that times out is an error here, not the end of the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group(
        worker.backend,
        store=dist.PrefixStore("group", store),
        rank=worker.place.rank,
        world_size=worker.place.world_size,
        timeout=timeout,
    )
    return dist.PrefixStore("board", store)


def supervise(
    worker: Worker,
    timeout_seconds: float,
    deterministic: bool,
    train: Callable[[Board], None],
    complain: Callable[[str], object],
) -> int:
    """Connect, run train(board) and return the exit code; what ends a run early gets one line.

    A failed collective is told by every survivor, with who fell behind; another failure by rank 0, since the
    others know no more than it does.
    """
    board = None
    try:
        with connect(worker, timeout_seconds, deterministic=deterministic) as board:
            train(board)
    except CommunicationError as error:
        # The launcher ends the survivors when it sees a worker dead; first they say what they know.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        complain(f"rank {worker.place.rank}: {error}{f'; {board.blame()}' if board else ''}")
        return 1
    except TrainingError as error:
        if worker.place.rank == 0:
            complain(str(error))
        return 1
    except OSError as error:  # a full disk, say
        complain(f"rank {worker.place.rank}: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
