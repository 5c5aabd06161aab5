"""From an environment to a running worker: which rank, which device.

A run is one process, for one worker or for all of a simulation; or a worker that a launcher started
(sage/workers/rendezvous.py knows which launchers); or, with --workers N, the parent of N processes.
"""

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from sage.console import complain, readable_bytes, say
from sage.interfaces import CommunicationError, Stopped, TrainingError
from sage.workers import group, rendezvous
from sage.workers.group import LOOPBACK, SECRET
from sage.workers.processes import WorkerProcesses
from sage.workers.signals import WATCH
from sage.workers.store import PATIENCE_SECONDS, RendezvousStore
from sage.workers.worker import Worker

BYTES_PER_WORKER = 400_000_000
"""What torch and this program take in each process (measured: 450 MB on a CPU)."""


def is_first_on_host() -> bool:
    """Whether this process is the first of its host's workers: the one that prints what all would print."""
    return rendezvous.is_first_on_host(os.environ)


def wait_before_exit() -> int:
    """Wait until the first process of the host has had time to print the error; returns the exit code for bad
    input. A launcher ends all workers as soon as one ends."""
    time.sleep(PATIENCE_SECONDS)
    return 2


def find_worker(
    num_threads: int | None,
    data: Path | None,
    num_workers: int | None,
    world_size: int | None = None,
    num_simulated: int | None = None,
) -> Worker:
    """Find out which worker this process is, from its launcher's variables. Without a launcher it is rank 0
    of num_workers that are to be started, or of num_simulated in this process.

    data: the folder of data sets; None: SAGE_DATA, or else ./data. world_size: the configuration's. Raises
    ValueError where a launcher's variable is not a number, where its numbers contradict num_workers or
    world_size, or where a launcher started a simulation.
    """
    if num_simulated is None:
        found = rendezvous.find_rendezvous(os.environ, num_workers, world_size)
    else:
        found = rendezvous.find_simulation(os.environ, num_simulated, world_size)
    if not found.launched and num_workers is not None:
        _check_memory(num_workers)
    num_gpus = torch.cuda.device_count()
    # The only visible GPU may be one that the launcher chose for this worker: check_identities finds out.
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


def _check_memory(num_workers: int) -> None:
    """Raise ValueError where so many processes do not fit into this machine's memory, even without a
    model."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = 1024 * int(lines["MemAvailable"].split()[0])
    if num_workers * BYTES_PER_WORKER > free_bytes:
        raise ValueError(
            f"--workers: expected at most {free_bytes // BYTES_PER_WORKER}, since a process takes about "
            f"{readable_bytes(BYTES_PER_WORKER)} before its model and {readable_bytes(free_bytes)} are free, "
            f"got {num_workers}"
        )


# --- processes on this machine --------------------------------------------------------------------


def spawn(command: Sequence[str], num_workers: int) -> int:
    """Run `python COMMAND` in num_workers processes, and return the exit code.

    A command, not a function: each child is a process of its own session, so that Ctrl-C reaches it once,
    through this process, which hands all signals on and waits. When one fails, the others are ended.
    """
    # The store belongs to this process, so it outlives every worker: survivors can tell who fell behind.
    store = group.open_local_store()
    secret = secrets.token_hex(16)
    environments = [_worker_environment(rank, num_workers, store.port, secret) for rank in range(num_workers)]
    workers = WorkerProcesses()
    with WATCH.handed_on(workers.send):
        try:
            with WATCH.held():
                workers.start(command, environments)
            failure = workers.wait()
        finally:
            workers.end()
    return _report_failure(*failure) if failure else 0


def _worker_environment(rank: int, num_workers: int, port: int, secret: str) -> dict[str, str]:
    """This process's variables, those that torchrun sets for a worker, and the secret of this run. Unless the
    user has set another value, all talk through the loopback interface, and torch's C++ side prints nothing:
    its errors come as exceptions."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_workers, "LOCAL_WORLD_SIZE": num_workers}
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    variables = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SECRET: secret,
        **{name: str(number) for name, number in numbers.items()},
    }
    return defaults | os.environ | variables


def _report_failure(rank: int, code: int) -> int:
    """Say which worker was the first to fail; returns the exit code of the whole run.

    code: the worker's; less than 0 where a signal killed it.
    """
    if code == 128 + signal.SIGINT:  # by Ctrl-C, which rank 0 has said
        return code
    how = f"to fail (signal {-code})" if code < 0 else f"to give up (exit code {code})"
    say(f"worker {rank} was the first {how}; the run has ended")
    return code if code > 0 else 1


# --- one worker ------------------------------------------------------------------------------------


def supervise(
    worker: Worker,
    timeout_seconds: float,
    deterministic: bool,
    train: Callable[[RendezvousStore], None],
) -> int:
    """Connect, run train(store) and return the exit code; an error is printed in one line.

    After a failed collective every survivor prints its error, and which worker fell behind; other failures
    are printed by rank 0, since the others know no more than it does.
    """
    store = None
    try:
        with group.connect(worker, timeout_seconds, deterministic=deterministic) as store:
            return _train(train, store)
    except CommunicationError as error:
        # The launcher ends the survivors when it sees a worker dead; they print what they know before.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _complain_of_others(worker, store, error)
    except TrainingError as error:
        if worker.place.rank == 0:
            complain(str(error))
    except OSError as error:  # a full disk, say
        complain(f"rank {worker.place.rank}: {error}")
    if worker.backend == "nccl" and worker.place.world_size > 1:
        _end_process()
    return 1


def end_process(worker: Worker, store: RendezvousStore | None, error: CommunicationError) -> NoReturn:
    """Print an error and which worker fell behind, and end the process, whatever its other threads wait
    for."""
    _complain_of_others(worker, store, error)
    _end_process()


def _end_process() -> NoReturn:
    """End this process at once: at Python's own end it would wait for its GPU, which may wait for a lost
    worker."""
    group.abort()
    sys.stdout.flush()
    os._exit(1)


def _complain_of_others(worker: Worker, store: RendezvousStore | None, error: CommunicationError) -> None:
    who = f"; {store.blame()}" if store else ""
    complain(f"rank {worker.place.rank}: {error}{who}")


def _train(train: Callable[[RendezvousStore], None], store: RendezvousStore) -> int:
    """Run train(store) while signals are noted; returns the exit code of a run that ended well or was
    stopped."""
    try:
        with WATCH.deferred():
            train(store)
    except Stopped as stopped:
        return 128 + signal.SIGINT if stopped.by_hand else 0
    return 0
