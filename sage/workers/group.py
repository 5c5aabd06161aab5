"""The process group of a run's workers: how it is formed, taken down and aborted.

What torch does there may hang where a worker is lost, whatever its timeouts say: such calls are made in a
thread, and given up.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store

from sage.console import say
from sage.interfaces import CommunicationError, TrainingError
from sage.workers.rendezvous import Rendezvous
from sage.workers.store import PATIENCE_SECONDS, STORE_SECONDS, RendezvousStore, reason_of
from sage.workers.worker import Worker, check_identities

LOOPBACK = "127.0.0.1"
SECRET = "SAGE_SECRET"
"""The variable by which --workers hands its workers a secret of the run."""
ABORT_SECONDS = 5.0
"""How long NCCL may take to abort what it does."""
Result = TypeVar("Result")


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


def abort() -> None:
    """End all that NCCL still does for the default process group, where there is one, in a short time."""
    if not dist.is_initialized():
        return
    abort_group = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)
    with suppress(Exception):  # the process ends in any case
        _call_in_time(
            partial(abort_group, dist.group.WORLD), ABORT_SECONDS, "NCCL does not let itself be aborted"
        )


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


def open_local_store() -> dist.TCPStore:
    """A rendezvous store that only this machine can reach: given an address, TCPStore listens on all of
    them. Without libuv, which takes no listener in torch 2.6."""
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
