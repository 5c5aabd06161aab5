"""NCCL with one worker: which types it takes, what a wait does, what a read past its deadline does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.gpu.measure import timed
from sage.exchange.comm import DistComm
from sage.exchange.deadline import Deadline
from sage.interfaces import CommunicationError, Place
from sage.workers import group
from sage.workers.rendezvous import Rendezvous
from sage.workers.worker import Worker

TIMEOUT_SECONDS, DEADLINE_SECONDS = 20.0, 0.5
TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
)
BUSY_CYCLES = 1_000_000_000
"""About half a second of a GPU's time."""


@contextmanager
def group_of_one(setup: Setup, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[DistComm]:
    """A process group of this process alone, set up as a run's; gloo on a machine without a GPU.

    A communicator's public methods have nothing to do for a single worker, so the private ones are called.
    """
    backend = "nccl" if setup.on_gpu else "gloo"
    rendezvous = Rendezvous(Place(0, 1), 0, 1, launched=True)
    worker = Worker(rendezvous, setup.device, backend, torch.get_num_threads(), setup.folder)
    if setup.on_gpu:
        group._set_up_nccl(speaks=True)
    group._join_group(worker, dist.HashStore(), timeout_seconds)
    try:
        yield DistComm(deadline=Deadline(timeout_seconds))
    finally:
        dist.destroy_process_group()


def try_types(setup: Setup) -> Iterator[Row]:
    """Every collective with every type that a reducer or the trainer may send."""
    with group_of_one(setup) as comm:
        calls: dict[str, Callable[[Tensor], object]] = {
            "sum": lambda x: comm._all_reduce(x, "sum"),
            "max": lambda x: comm._all_reduce(x, "max"),
            "gather": comm._all_gather,
            "all to all": comm._all_to_all,
            "broadcast": lambda x: comm._broadcast(x, 0),
        }
        for dtype in TYPES:
            ones = torch.ones(5, device=setup.device, dtype=dtype)
            yield {"type": str(dtype), **{name: _outcome(call, ones.clone()) for name, call in calls.items()}}


def _outcome(call: Callable[[Tensor], object], x: Tensor) -> str:
    try:
        call(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return "works" if bool((x == 1).all()) else "wrong"


def wait_behind_work(setup: Setup) -> Iterator[Row]:
    """How long an all-reduce, its wait, and reading its result take on the host, behind half a second of
    work."""
    with group_of_one(setup) as comm:
        x = torch.ones(2**10 if setup.small else 2**20, device=setup.device)
        comm._all_reduce(x, "sum")
        for asynchronous in (False, True):
            if setup.on_gpu:
                torch.cuda.synchronize()
                torch.cuda._sleep(BUSY_CYCLES)
            started = time.perf_counter()
            work = dist.all_reduce(x, async_op=asynchronous)
            called = time.perf_counter()
            if work is not None:
                work.wait()
            waited = time.perf_counter()
            comm.read(x[:1])
            read = time.perf_counter()
            yield {
                "all-reduce": "asynchronous" if asynchronous else "synchronous",
                "returns a work": work is not None,
                "call, ms": 1000 * (called - started),
                "wait, ms": 1000 * (waited - called),
                "read, ms": 1000 * (read - waited),
            }


def read_too_late(setup: Setup) -> Iterator[Row]:
    """What a read past its deadline does, behind two seconds of work, as behind a lost peer's collective."""
    if not setup.on_gpu:
        return
    with group_of_one(setup, DEADLINE_SECONDS) as comm:
        x = torch.ones(4, device=setup.device)
        comm._all_reduce(x, "sum")
        comm.read(x)
        torch.cuda._sleep(4 * BUSY_CYCLES)
        comm._all_reduce(x, "sum")
        started, message = time.perf_counter(), "none"
        try:
            comm.read(x)
        except CommunicationError as error:
            message = str(error)
        yield {
            "deadline, s": DEADLINE_SECONDS,
            "left after, s": time.perf_counter() - started,
            "error": message,
        }
        torch.cuda.synchronize()


def time_small_messages(setup: Setup) -> Iterator[Row]:
    with group_of_one(setup) as comm:
        for count in (1, 2**8) if setup.small else (1, 2**8, 2**16, 2**24):
            x = torch.ones(count, device=setup.device)
            timing = timed(lambda: comm._all_reduce(x, "sum"), setup.device, seconds=1)  # noqa: B023
            gathered = timed(lambda: comm._all_gather(x), setup.device, seconds=1)  # noqa: B023
            yield {
                "bytes": x.nbytes,
                "all-reduce, ms": timing.queued,
                "all-reduce, host ms": timing.host,
                "all-gather, ms": gathered.queued,
                "all-gather, host ms": gathered.host,
            }


def checks(setup: Setup) -> list[Check]:
    return [
        Check(measure.__name__.replace("_", " "), partial(measure, setup))
        for measure in (try_types, wait_behind_work, time_small_messages, read_too_late)
    ]


SECTION = Section(
    "nccl",
    "NCCL with a single worker (gloo on a machine without a GPU): which types the collectives take; what a "
    "call, its wait and a read cost the host behind half a second of work; messages of some sizes to itself.",
    25,
    checks,
    fresh=True,
)
