"""Workers that take turns in one process, on one model: --simulate W.

Each worker is a thread with a trainer, task, reducer, memory and generators of its own. One of them computes
at a time; it gives up its turn while it waits for the others in a collective. What they would hold alike, the
weights, the optimizer's state and the data, is held once.
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm, LocalComm, connect_comm
from sage.interfaces import CommunicationError, Place, Stateful, Stopped, Task, TrainingError
from sage.training.train import Trainer
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker


class WorkerContext:
    """How a worker stands to the others: by itself in its process."""

    trainer: type[Trainer] = Trainer

    def connect(self, world_size: int, clock: Clock | None = None) -> CountingComm:
        """A communicator of this worker."""
        return connect_comm(world_size, clock)

    def share(self, task: Task) -> None:
        """Hold once what the workers of this process hold alike."""


TrainWorker = Callable[[Worker, RendezvousStore, WorkerContext], None]


class TurnLock:
    """A worker's turn: while it lasts no other worker computes, and torch's global generators are in the
    state in which this worker left them (dropout draws from them)."""

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
        self._states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self._on_gpu else [])]
        self._lock.release()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The turn is the others'."""
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
        self._wait()  # until every worker has its gradient
        with self.clock.phase("optimizer"):  # on all workers: the time that each of them would take
            if self.comm.rank == 0:
                super().apply(lr_factor)
            self._wait()

    def replicated(self) -> list[tuple[str, Tensor]]:
        """The mean of the last step: rank 0 applied its own, and every worker must have the same."""
        named = self.task.model.named_parameters()
        return [(f"the mean gradient of {name}", p.grad) for name, p in named if p.grad is not None]


class SimulatedContext(WorkerContext):
    """One worker's thread; the others are on the same context."""

    trainer = SimulatedTrainer

    def __init__(self, comm: LocalComm, turn: TurnLock, shared: list[Task]) -> None:
        """shared: of all workers, empty until the first has built its task."""
        self.comm, self.turn, self._shared = comm, turn, shared

    def connect(self, world_size: int, clock: Clock | None = None) -> CountingComm:
        return self.comm.beside(clock, self.turn.away)

    def share(self, task: Task) -> None:
        """Point the task's parameters to the first task's, which get rank 0's values, and likewise what it
        holds of the data with the same bits; a worker's state (state_names) and buffers stay its own."""
        if not self._shared:
            self._shared.append(task)
            return
        first = self._shared[0]
        for ours, mine in zip(first.model.parameters(), task.model.parameters(), strict=True):
            if self.comm.rank == 0:
                ours.data.copy_(mine.data)
            mine.data = ours.data
        own = task.state_names if isinstance(task, Stateful) else ()
        for name, value in vars(task).items():
            alike = isinstance(value, Tensor) and _same_bits(value, getattr(first, name))
            if alike and name not in own:
                setattr(task, name, getattr(first, name))


class SimulatedStore(RendezvousStore):
    """What the workers of a simulation tell one another; every one of them calls each method."""

    def __init__(self, place: Place, comm: LocalComm) -> None:
        super().__init__(place, None)
        self._comm = comm

    def agree(self, name: str, value: str) -> str:
        return self.collect(name, value)[0]

    def collect(self, name: str, value: str) -> list[str]:
        return self._comm.collect(name, value)


def alone(train: TrainWorker, worker: Worker, timeout_seconds: float, store: RendezvousStore) -> None:
    """Call train(worker, store, context) for a worker that has its process to itself."""
    train(worker, store, WorkerContext())


def simulate(train: TrainWorker, worker: Worker, timeout_seconds: float, store: RendezvousStore) -> None:
    """Call train(worker, store, context) for every worker of worker.place.world_size, in a thread each.

    A collective waits as long as the other workers may take in turn, timeout_seconds each. Raises
    Stopped, or TrainingError, which names the first worker to fail; the traceback of what nobody foresaw is
    printed.
    """
    world_size, lock, shared = worker.place.world_size, threading.Lock(), list[Task]()
    failures: list[tuple[int, Exception]] = []

    def train_one(comm: LocalComm) -> None:
        torch.set_num_threads(worker.num_threads)  # OpenMP's number is a thread's own
        place, turn = Place(comm.rank, world_size), TurnLock(lock, worker.device)
        try:
            with turn:
                context = SimulatedContext(comm.beside(away=turn.away), turn, shared)
                train(worker.with_rank(comm.rank), SimulatedStore(place, context.comm), context)
        except Exception as error:
            failures.append((comm.rank, error))
            raise

    try:
        LocalComm.run(world_size, train_one, timeout_seconds * world_size)
    except Exception as error:
        # One may have more to tell than that it was stopped like the others.
        rank, failure = min(failures or [(0, error)], key=lambda pair: isinstance(pair[1], Stopped))
        if isinstance(failure, Stopped):  # every worker has
            raise failure from None
        raise _told(rank, failure) from failure


def _told(rank: int, failure: Exception) -> TrainingError:
    if isinstance(failure, TrainingError):  # every worker has found it
        return failure
    if isinstance(failure, CommunicationError | OSError):
        return TrainingError(f"rank {rank}: {failure}")
    traceback.print_exception(failure)
    kind = type(failure).__name__
    return TrainingError(f"worker {rank} was the first to fail ({kind}: {failure}); the run has ended")


def _same_bits(value: Tensor, other: object) -> bool:
    """Whether two tensors have one type, shape and content; NaN is like itself."""
    if not isinstance(other, Tensor) or (value.dtype, value.shape) != (other.dtype, other.shape):
        return False
    ours, theirs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (value, other))
    return torch.equal(ours, theirs)
