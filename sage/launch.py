"""From an environment to a running worker: who am I, which device, which process group. The only reader of
os.environ.

One process; torchrun's variables; or --workers N, which starts N processes through torch's own elastic
launcher.
"""

import logging
import os
import signal
import socket
import sys
import time
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

from sage.interfaces import CommunicationError, Place, TrainingError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher passes on to its workers; SIGUSR1 is SLURM's warning before the time limit."""
SILENCE_SECONDS = 1.0
"""How long the survivors of a failed collective wait for one another before calling the silent ones lost."""


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

    def facts(self) -> dict[str, Any]:
        """What environment.json says of all workers alike."""
        return {
            "world_size": self.place.world_size,
            "backend": self.backend if self.place.world_size > 1 else None,
            "threads_per_worker": self.num_threads,
        }

    def where(self) -> str:
        """The host and the device, for the record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{socket.gethostname()}/{name}"

    def describe(self) -> str:
        """The choices made here, in one line."""
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
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks_here() -> bool:
    """Whether this process is the one of its host that says what is wrong."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def find_worker(num_threads: int | None, num_workers: int | None, data: Path | None) -> Worker:
    """This process's worker, by torchrun's variables; else worker 0 of num_workers that are to be started.

    The data folder is the given one, else SAGE_DATA, else ./data. Raises ValueError where the launcher's
    numbers are none, or are not num_workers.
    """
    environ = os.environ if started_by_launcher() else {}
    world_size = _number(environ, "WORLD_SIZE", num_workers or 1)
    if num_workers not in (None, world_size):
        raise ValueError(f"--workers: expected {world_size}, as launched, got {num_workers}")
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    local_rank = _number(environ, "LOCAL_RANK", 0)
    num_gpus = torch.cuda.device_count()
    return Worker(
        place=Place(_number(environ, "RANK", 0), world_size),
        local_world_size=local_world_size,
        device=torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu"),
        backend="nccl" if num_gpus >= local_world_size else "gloo",
        num_threads=num_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size),
        data=data or Path(os.environ.get("SAGE_DATA", "data")),
    )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a number from the launcher, got {text!r}")
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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it logs is said below
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        say(f"worker {rank} was the first to fail ({how}); the run has ended")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        say(f"stopped by {error.sigval.name}; the workers have ended")
        return 128 + int(error.sigval)
    return 0


class Board:
    """Each worker's step, in the rendezvous store: there one can read who fell behind in a collective."""

    def __init__(self, place: Place, store: Store | None) -> None:
        self.place = place
        self._store = store

    def agree(self, name: str, value: str) -> str:
        """Rank 0's value, on every worker."""
        if self._store is None:
            return value
        if self.place.rank == 0:
            self._store.set(name, value)
        return str(self._store.get(name).decode())

    def collect(self, name: str, value: str) -> list[str]:
        """Every worker's value, in rank order."""
        if self._store is None:
            return [value]
        self._store.set(f"{name}/{self.place.rank}", value)
        return [self._store.get(f"{name}/{rank}").decode() for rank in range(self.place.world_size)]

    def set_step(self, step: int) -> None:
        if self._store is not None:
            self._store.set(f"step/{self.place.rank}", str(step))

    def blame(self) -> str:
        """Which workers fell behind, in one line; asked by the survivors of a failed collective.

        Each survivor marks itself, waits SILENCE_SECONDS for the others to do so, and names those that have
        not.
        """
        if self._store is None:
            return "there is no other worker"
        try:
            self._store.set(f"survived/{self.place.rank}", "1")
            time.sleep(SILENCE_SECONDS)
            steps = {rank: self._step_of(rank) for rank in range(self.place.world_size)}
            silent = [rank for rank in steps if not self._store.check([f"survived/{rank}"])]
        except RuntimeError as error:  # the store's own error, when its host is gone
            reason = str(error).splitlines()[0]
            return f"the rendezvous store is gone, so no worker's step is known ({reason})"
        told = ", ".join(f"rank {rank} at step {step}" for rank, step in steps.items())
        if not silent:
            return f"every worker is alive and gave up ({told})"
        return f"rank {', '.join(map(str, silent))} fell behind: it no longer answers ({told})"

    def _step_of(self, rank: int) -> str:
        assert self._store is not None
        key = f"step/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "none"


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
    if worker.place.world_size == 1:
        yield Board(worker.place, None)
        return
    try:
        store = _join_group(worker, timedelta(seconds=timeout_seconds))
    except RuntimeError as error:  # DistError and its kind
        reason = str(error).strip().splitlines()[0]
        raise CommunicationError(f"could not meet the other workers: {reason}") from error
    yield Board(worker.place, store)
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
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
