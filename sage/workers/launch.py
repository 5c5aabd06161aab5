"""From an environment to a running worker: who am I, which device, which process group. The only reader of
os.environ.

One process, for one worker or for all of a simulation; a worker that a launcher started (sage/rendezvous.py
knows which); or --workers N, which starts N processes through torch's own launcher of processes.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from sage.console import complain, first_line, say
from sage.interfaces import CommunicationError, Stopped, TrainingError
from sage.workers import rendezvous
from sage.workers.rendezvous import Rendezvous
from sage.workers.signals import WATCH
from sage.workers.store import PATIENCE_SECONDS, STORE_SECONDS, RendezvousStore
from sage.workers.worker import Worker, check_claims

POLL_SECONDS = 0.2


def speaks_here() -> bool:
    """Whether this process is the one of its host that says what is wrong."""
    return rendezvous.speaks_here(os.environ)


def give_way() -> int:
    """The exit code for bad input of a process that does not speak. It comes late: a launcher ends all
    workers when the first ends, and the one that speaks may not have spoken."""
    time.sleep(PATIENCE_SECONDS)
    return 2


def find_worker(
    num_threads: int | None,
    data: Path | None,
    num_workers: int | None,
    world_size: int | None = None,
    num_simulated: int | None = None,
) -> Worker:
    """This process's worker, by its launcher's variables; else worker 0 of num_workers to be started, or of
    num_simulated in this process.

    The data folder is the given one, else SAGE_DATA, else ./data; world_size is the configuration's. Raises
    ValueError where the launcher's numbers are none, or contradict num_workers or world_size, or where a
    launcher started a simulation.
    """
    if num_simulated is None:
        found = rendezvous.find_rendezvous(os.environ, num_workers, world_size)
    else:
        found = rendezvous.refuse_launcher(os.environ, num_simulated, world_size)
    num_gpus = torch.cuda.device_count()
    # A single GPU in sight may be one that the launcher chose for this worker alone: the meeting will tell.
    has_own_gpu = num_gpus >= found.local_world_size or (num_gpus == 1 and found.chooses_gpu)
    num_cpus = found.num_cpus or len(os.sched_getaffinity(0)) // found.local_world_size
    return Worker(
        rendezvous=found,
        device=torch.device("cuda", found.local_rank % num_gpus) if num_gpus else torch.device("cpu"),
        backend="threads" if num_simulated else "nccl" if has_own_gpu else "gloo",
        num_threads=num_threads or max(1, num_cpus),
        data=data or Path(os.environ.get("SAGE_DATA") or "data"),
        simulated=num_simulated is not None,
    )


def spawn(command: Sequence[str], num_workers: int) -> int:
    """Run `python COMMAND` in num_workers processes, and return the exit code.

    A command, not a function: each child is a process of its own session, so that Ctrl-C reaches it once,
    through this process, which hands all signals on and waits. When one fails, the others are ended.
    """
    # Here: workers, and runs of one worker, do without.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    for name in list(logging.root.manager.loggerDict):
        # each has a level of its own; what they log is said below
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no C++ stacks: errors come as exceptions
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # torch's own handlers would end the workers
    # Held here, the store outlives every worker, so that survivors can tell who fell behind.
    held = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = range(num_workers)
    pids: list[int] = []

    def send(number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    with WATCH.handed_on(send):
        with WATCH.held():
            workers = start_processes(
                "worker",
                sys.executable,
                {rank: ("-u", *command) for rank in ranks},
                {rank: _torchrun_environment(rank, num_workers, held.port) for rank in ranks},
                DefaultLogsSpecs(log_dir=os.devnull),
            )
            pids += workers.pids().values()
        result = workers.wait(period=POLL_SECONDS)
    assert result is not None  # without a timeout
    if not result.failures:
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode == 128 + signal.SIGINT:  # by Ctrl-C, which rank 0 has said
        return 128 + signal.SIGINT
    died = first.exitcode < 0
    how = f"to fail (signal {-first.exitcode})" if died else f"to give up (exit code {first.exitcode})"
    say(f"worker {first.local_rank} was the first {how}; the run has ended")
    return first.exitcode if first.exitcode > 0 else 1


def _torchrun_environment(rank: int, num_workers: int, port: int) -> dict[str, str]:
    """What torchrun would tell a worker."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_workers, "LOCAL_WORLD_SIZE": num_workers}
    told = {name: str(number) for name, number in numbers.items()}
    return told | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextmanager
def connect(worker: Worker, timeout_seconds: float, *, deterministic: bool) -> Iterator[RendezvousStore]:
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
        yield RendezvousStore(worker.place, None)
        return
    try:
        tcp_store = _open_store(worker.rendezvous, timeout_seconds)
        store = RendezvousStore(
            worker.place, dist.PrefixStore("run", tcp_store), min(timeout_seconds, PATIENCE_SECONDS)
        )
        check_claims(store.collect("claim", worker.claim()))
        _join_group(worker, tcp_store, timedelta(seconds=timeout_seconds))
    except TrainingError:
        raise
    except RuntimeError as error:  # DistError and its kind
        where = f"{worker.rendezvous.address}:{worker.rendezvous.port}"
        raise CommunicationError(
            f"could not meet the other workers at {where}: {first_line(error)}"
        ) from error
    yield store
    dist.destroy_process_group()


def _open_store(meeting: Rendezvous, timeout_seconds: float) -> Store:
    """The rendezvous store; rank 0 holds it, unless torchrun does. Raises RuntimeError.

    Opened in a thread: its own timeout does not hold where something else answers at the port and is silent.
    """
    opened: list[Store | RuntimeError] = []

    def open_store() -> None:
        try:
            opened.append(
                dist.TCPStore(
                    meeting.address,
                    meeting.port,
                    meeting.place.world_size,
                    is_master=meeting.place.rank == 0
                    and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
                    timeout=timedelta(seconds=timeout_seconds),
                )
            )
        except RuntimeError as error:
            opened.append(error)

    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(timeout_seconds + STORE_SECONDS)
    if not opened:
        raise CommunicationError(f"what listens there said nothing within {timeout_seconds:g} s")
    if isinstance(opened[0], RuntimeError):
        raise opened[0]
    return opened[0]


def _join_group(worker: Worker, tcp_store: Store, timeout: timedelta) -> None:
    """Set up the default process group."""
    if worker.backend == "nccl":  # a collective that times out is an error here, not the end of the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group(
        worker.backend,
        store=dist.PrefixStore("group", tcp_store),
        rank=worker.place.rank,
        world_size=worker.place.world_size,
        timeout=timeout,
    )


def supervise(
    worker: Worker,
    timeout_seconds: float,
    deterministic: bool,
    train: Callable[[RendezvousStore], None],
) -> int:
    """Connect, run train(store) and return the exit code; what ends a run early gets one line.

    A failed collective is told by every survivor, with who fell behind; another failure by rank 0, since the
    others know no more than it does.
    """
    store, code = None, 0
    try:
        with connect(worker, timeout_seconds, deterministic=deterministic) as store:
            try:
                with WATCH.deferred():
                    train(store)
            except Stopped as stopped:
                code = 128 + signal.SIGINT if stopped.by_hand else 0
    except CommunicationError as error:
        # The launcher ends the survivors when it sees a worker dead; first they say what they know.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        complain(f"rank {worker.place.rank}: {error}{f'; {store.blame()}' if store else ''}")
        return 1
    except TrainingError as error:
        if worker.place.rank == 0:
            complain(str(error))
        return 1
    except OSError as error:  # a full disk, say
        complain(f"rank {worker.place.rank}: {error}")
        return 1
    return code
