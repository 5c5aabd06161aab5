"""Several workers that take turns in one process, on one model: --simulate W.

Each worker is a thread with its own trainer, task, reducer, memory and generators. One of them computes at a
time; while it waits for the others in a collective, it lets another compute. What all of them hold alike (the
weights, the optimizer's state, the data) is held once.
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm, LocalComm, connect_comm
from sage.exchange.deadline import Deadline
from sage.interfaces import CommunicationError, Place, Stopped, Task, TrainingError
from sage.training.agree import wait_for_all
from sage.training.train import Trainer
from sage.workers import launch
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker


class WorkerContext:
    """What depends on how many workers a process has: here one."""

    trainer: type[Trainer] = Trainer
    deadline: Deadline | None = None
    """For waiting for the device, where other processes can let it wait for ever."""

    def connect(self, world_size: int, clock: Clock | None = None) -> CountingComm:
        """A new communicator of this worker."""
        return connect_comm(world_size, clock, self.deadline)

    def share(self, task: Task) -> None:
        """Hold once what is the same for all workers of this process."""


TrainWorker = Callable[[Worker, RendezvousStore, WorkerContext], None]


class TurnLock:
    """Lets one worker of the process compute at a time, with torch's global generators (dropout draws from
    them) in the state in which this worker left them."""

    def __init__(self, lock: threading.Lock, device: torch.device) -> None:
        """lock: one for all workers."""
        self._lock = lock
        self._on_gpu = device.type == "cuda"
        self._states: list[Tensor] = []

    def __enter__(self) -> Self:
        self._lock.acquire()
        for state, put in zip(self._states, (torch.set_rng_state, torch.cuda.set_rng_state), strict=False):
            put(state)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self._on_gpu else [])]
        finally:
            self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let other workers compute in the with-block."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class SimulatedTrainer(Trainer):
    """A trainer whose model shares its weights with the other workers': rank 0's optimizer steps for all."""

    simulated = True

    @property
    def holds_optimizer(self) -> bool:
        return self.comm.rank == 0

    def apply(self, lr_factor: float) -> None:
        with self.clock.phase("agree"):
            wait_for_all(self.side, self.device)  # until every worker has its gradient
        with self.clock.phase("optimizer"):  # on all workers: the time that each of them would take
            if self.comm.rank == 0:
                super().apply(lr_factor)
            wait_for_all(self.side, self.device)

    def replicated(self) -> list[tuple[str, Tensor]]:
        """The mean of the last step: rank 0 applied its own, and every worker must have the same."""
        named = self.task.model.named_parameters()
        return [(f"the mean gradient of {name}", p.grad) for name, p in named if p.grad is not None]


class SimulatedContext(WorkerContext):
    """What one of several workers of a process has of its own, in a thread of its own."""

    trainer = SimulatedTrainer

    def __init__(self, comm: LocalComm, turn: TurnLock, shared: list[Task]) -> None:
        """shared: one list for all workers, empty until the first of them has built its task."""
        self.comm, self.turn, self._shared = comm, turn, shared

    def connect(self, world_size: int, clock: Clock | None = None) -> CountingComm:
        return self.comm.another(clock, self.turn.released)

    def share(self, task: Task) -> None:
        """Let the task's parameters be the first task's, with rank 0's values, and likewise the data that it
        holds with the same bits. A worker's state (state_names) and buffers remain its own."""
        if not self._shared:
            self._shared.append(task)
            return
        first = self._shared[0]
        for ours, mine in zip(first.model.parameters(), task.model.parameters(), strict=True):
            if self.comm.rank == 0:
                ours.data.copy_(mine.data)
            mine.data = ours.data
        for name, value in vars(task).items():
            is_same = isinstance(value, Tensor) and _same_bits(value, getattr(first, name))
            if is_same and name not in task.state_names:
                setattr(task, name, getattr(first, name))


class SimulatedStore(RendezvousStore):
    """The rendezvous store of workers in one process; every one of them calls each method."""

    def __init__(self, place: Place, comm: LocalComm) -> None:
        super().__init__(place, None)
        self._comm = comm

    def agree(self, name: str, value: str) -> str:
        return self.collect(name, value)[0]

    def collect(self, name: str, value: str) -> list[str]:
        return self._comm.collect(name, value)


def run_single(train: TrainWorker, worker: Worker, timeout_seconds: float, store: RendezvousStore) -> None:
    """Call train(worker, store, context) for the only worker of this process. Where another process is lost
    while this one waits for its GPU, the process ends."""
    context = WorkerContext()
    if worker.place.world_size == 1 or worker.device.type == "cpu":
        return train(worker, store, context)
    context.deadline = Deadline(timeout_seconds)
    with context.deadline.watched(partial(launch.end_process, worker, store)):
        train(worker, store, context)


def simulate(train: TrainWorker, worker: Worker, timeout_seconds: float, store: RendezvousStore) -> None:
    """Call train(worker, store, context) for each of worker.place.world_size workers, in a thread of its own.

    A collective waits as long as the other workers may take one after the other, timeout_seconds each. Raises
    Stopped, or TrainingError, which names the first worker to fail. The traceback of an unexpected error is
    printed.
    """
    world_size, lock, shared = worker.place.world_size, threading.Lock(), list[Task]()
    failures: list[tuple[int, Exception]] = []

    def train_one(comm: LocalComm) -> None:
        torch.set_num_threads(worker.num_threads)  # OpenMP's number is a thread's own
        place, turn = Place(comm.rank, world_size), TurnLock(lock, worker.device)
        try:
            with turn:
                context = SimulatedContext(comm.another(while_waiting=turn.released), turn, shared)
                train(worker.with_rank(comm.rank), SimulatedStore(place, context.comm), context)
        except Exception as error:
            failures.append((comm.rank, error))
            raise

    try:
        LocalComm.run(world_size, train_one, timeout_seconds * world_size)
    except Exception as error:
        # A worker that failed says more than one that was only stopped like the others.
        rank, failure = min(failures or [(0, error)], key=lambda pair: isinstance(pair[1], Stopped))
        if isinstance(failure, Stopped):  # every worker has
            raise failure from None
        raise _as_training_error(rank, failure) from failure


def _as_training_error(rank: int, failure: Exception) -> TrainingError:
    if isinstance(failure, TrainingError):  # every worker has found it
        return failure
    if isinstance(failure, CommunicationError | OSError):
        return TrainingError(f"rank {rank}: {failure}")
    traceback.print_exception(failure)
    kind = type(failure).__name__
    return TrainingError(f"worker {rank} was the first to fail ({kind}: {failure}); the run has ended")


def _same_bits(value: Tensor, other: object) -> bool:
    """Whether two tensors have the same type, shape and bits; NaN equals itself."""
    if not isinstance(other, Tensor) or (value.dtype, value.shape) != (other.dtype, other.shape):
        return False
    ours, theirs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (value, other))
    return torch.equal(ours, theirs)
