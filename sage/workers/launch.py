"""From an environment to a running worker: which rank, which device, which process group.

A run is one process, for one worker or for all of a simulation; or a worker that a launcher started
(sage/workers/rendezvous.py knows which launchers); or, with --workers N, the parent of N processes, which it
starts through torch's own launcher of processes.
"""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store

from sage.console import complain, readable_bytes, say
from sage.interfaces import CommunicationError, Stopped, TrainingError
from sage.workers import rendezvous
from sage.workers.rendezvous import Rendezvous
from sage.workers.signals import WATCH
from sage.workers.store import PATIENCE_SECONDS, STORE_SECONDS, RendezvousStore, reason_of
from sage.workers.worker import Worker, check_identities

BYTES_PER_WORKER = 400_000_000
"""What torch and this program take in each process (measured: 450 MB on a CPU)."""
LOOPBACK = "127.0.0.1"
SECRET = "SAGE_SECRET"
"""The variable by which --workers hands its workers a secret of the run."""
POLL_SECONDS = 0.2
"""How often the parent looks whether its workers have ended."""
ABORT_SECONDS = 5.0
"""How long NCCL may take to abort what it does."""
Result = TypeVar("Result")


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
    # Imported here: a worker, and a run of one worker, need none of it.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    _quiet_torch_launcher()
    # The store belongs to this process, so it outlives every worker: survivors can tell who fell behind.
    store = _open_local_store()
    secret = secrets.token_hex(16)
    ranks, pids = range(num_workers), list[int]()

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
                {rank: _worker_environment(rank, num_workers, store.port, secret) for rank in ranks},
                DefaultLogsSpecs(log_dir=os.devnull),
            )
            pids.extend(workers.pids().values())
        result = workers.wait(period=POLL_SECONDS)
    assert result is not None  # without a timeout
    if not result.failures:
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return _report_failure(first.local_rank, first.exitcode)


def _quiet_torch_launcher() -> None:
    """Turn off torch's own error messages and signal handlers, which would end the workers."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no C++ stacks: errors come as exceptions
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""


def _open_local_store() -> dist.TCPStore:
    """A rendezvous store that only this machine can reach: given an address, TCPStore listens on all of
    them. Without libuv, which takes no listener before torch 2.7."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,
    )


def _worker_environment(rank: int, num_workers: int, port: int, secret: str) -> dict[str, str]:
    """The variables that torchrun sets for a worker, the secret of this run, and that all talk through the
    loopback interface (unless the user has named another)."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_workers, "LOCAL_WORLD_SIZE": num_workers}
    variables = {name: str(number) for name, number in numbers.items()}
    return variables | {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        SECRET: secret,
        **{name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
    }


def _report_failure(rank: int, code: int) -> int:
    """Say which worker was the first to fail; returns the exit code of the whole run.

    code: the worker's; less than 0 where a signal killed it.
    """
    if code == 128 + signal.SIGINT:  # by Ctrl-C, which rank 0 has said
        return code
    how = f"to fail (signal {-code})" if code < 0 else f"to give up (exit code {code})"
    say(f"worker {rank} was the first {how}; the run has ended")
    return code if code > 0 else 1


# --- the process group ----------------------------------------------------------------------------


@contextmanager
def connect(worker: Worker, timeout_seconds: float, *, deterministic: bool) -> Iterator[RendezvousStore]:
    """Set up this process (threads, device, determinism) and, with several workers, the process group."""
    _set_up_torch(worker, deterministic)
    if worker.place.world_size == 1 or worker.simulated:
        yield RendezvousStore(worker.place, None)
        return
    try:
        if worker.backend == "nccl":
            _set_up_nccl(speaks=worker.place.rank == 0)
        store = _meet(worker, timeout_seconds)
    except TrainingError:
        raise
    except RuntimeError as error:  # DistError and its kind
        where = f"{worker.rendezvous.address}:{worker.rendezvous.port}"
        raise CommunicationError(
            f"could not meet the other workers at {where}: {reason_of(error)}"
        ) from error
    yield store
    _leave_group(worker, timeout_seconds)


def _set_up_torch(worker: Worker, deterministic: bool) -> None:
    torch.set_num_threads(worker.num_threads)
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        torch.use_deterministic_algorithms(True)
        # Filling new tensors with NaN costs a pass over each.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _set_up_nccl(speaks: bool) -> None:
    """Set the variables that NCCL's process group reads when it is made."""
    # With it torch starts no watchdog, and newer torch's collectives wait for nothing all the same: those who
    # survive a lost worker would hang for ever.
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if os.environ.pop(name, None) is not None and speaks:
            say(f"{name} is ignored: with it the others would wait for ever for a worker that is lost")
    # Ours is the deadline (sage/exchange/deadline.py), after which the survivors say who fell behind: torch's
    # watchdog would kill them.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def _meet(worker: Worker, timeout_seconds: float) -> RendezvousStore:
    """Meet the other workers, and form the process group with them. Raises RuntimeError; TrainingError where
    the workers cannot form one."""
    tcp_store: Store = _open_store(worker.rendezvous, timeout_seconds)
    # The store has no password, so its keys start with the run's secret. Only --workers can hand one to its
    # workers; other launches need a network that is trusted.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the workers
    tcp_store = dist.PrefixStore(f"{os.environ.get(SECRET, 'no secret')}/{attempt}", tcp_store)
    run_store = dist.PrefixStore("run", tcp_store)
    store = RendezvousStore(worker.place, run_store, min(timeout_seconds, PATIENCE_SECONDS))
    check_identities(store.collect_messages("identity", worker.identity()))
    _join_group(worker, tcp_store, timeout_seconds)
    return store


def _open_store(found: Rendezvous, timeout_seconds: float) -> Store:
    """Connect to the rendezvous store; rank 0 holds it, unless torchrun does. Raises RuntimeError.

    The store's own timeout has no effect where another program listens at the port and sends nothing.
    """

    def open_store() -> Store:
        return dist.TCPStore(
            found.address,
            found.port,
            found.place.world_size,
            is_master=found.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout_seconds),
        )

    problem = f"what listens there did not answer within {timeout_seconds:g} s"
    return _call_in_time(open_store, timeout_seconds + STORE_SECONDS, problem)


def _join_group(worker: Worker, tcp_store: Store, timeout_seconds: float) -> None:
    """Set up the default process group. Raises RuntimeError."""
    join = partial(
        dist.init_process_group,
        worker.backend,
        store=dist.PrefixStore("group", tcp_store),
        rank=worker.place.rank,
        world_size=worker.place.world_size,
    )
    if worker.backend != "nccl":
        join(timeout=timedelta(seconds=timeout_seconds))
        return
    # With device_id the workers connect here and not in the first collective, and without a timeout.
    # What torch's watchdog prints is to come later than what the survivors say.
    later = timedelta(seconds=timeout_seconds + PATIENCE_SECONDS + STORE_SECONDS)
    join = partial(join, timeout=later, device_id=worker.device)
    _call_in_time(join, timeout_seconds, f"NCCL did not connect the workers within {timeout_seconds:g} s")


def _leave_group(worker: Worker, timeout_seconds: float) -> None:
    """Take the default process group down, once all is done. Raises CommunicationError."""
    if worker.backend != "nccl":
        dist.destroy_process_group()
        return
    problem = f"NCCL did not let go of the other workers within {timeout_seconds:g} s"
    _call_in_time(dist.destroy_process_group, timeout_seconds, problem)


def _abort_group() -> None:
    """End all that NCCL still does for the default process group, in a time that is short."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)
    with suppress(RuntimeError):
        _call_in_time(partial(abort, dist.group.WORLD), ABORT_SECONDS, "NCCL does not let itself be aborted")


def _call_in_time(call: Callable[[], Result], seconds: float, problem: str) -> Result:
    """What a call returns or raises. It is made in a thread, since it may hang where a worker is lost; raises
    CommunicationError then."""
    results: list[Result] = []
    errors: list[Exception] = []

    def make_call() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=make_call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise CommunicationError(problem)
    return results[0]


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
        with connect(worker, timeout_seconds, deterministic=deterministic) as store:
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
    if dist.is_initialized():
        _abort_group()
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
