"""How long a step's exchange takes on this worker: compression, communication, and what it sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sage.exchange.comm import CountingComm
from sage.interfaces import Communicator

Mark = Any
"""A point in time: seconds, or on a GPU an event."""


class Stopwatch:
    """Marks points in time: on a GPU by events, which are read when they have long happened."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        """now: seconds, for what is no GPU."""
        self.on_gpu, self._now = device.type == "cuda", now

    def mark(self) -> Mark:
        if not self.on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()  # of two steps ago: the host does not wait
        return float(start.elapsed_time(end)) / 1000


class TimedComm(Communicator):
    """Notes when another communicator's collectives begin and end."""

    def __init__(self, comm: Communicator, watch: Stopwatch) -> None:
        self.rank, self.world_size = comm.rank, comm.world_size
        self._comm, self._watch = comm, watch
        self.spans: list[tuple[Mark, Mark]] = []

    @contextmanager
    def _noted(self) -> Iterator[None]:
        begin = self._watch.mark()
        yield
        self.spans.append((begin, self._watch.mark()))

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        with self._noted():
            self._comm.all_reduce(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._noted():
            return self._comm.all_gather(x)

    def all_gather_ragged(self, x: Tensor) -> list[Tensor]:
        with self._noted():
            return self._comm.all_gather_ragged(x)

    def broadcast(self, x: Tensor, source: int = 0) -> None:
        with self._noted():
            self._comm.broadcast(x, source)

    def read(self, x: Tensor) -> Tensor:
        return self._comm.read(x)

    def another(self) -> Communicator:
        return self._comm.another()


@dataclass
class StepTimes:
    """What one worker, or all together, measured of a step: seconds, and what was sent."""

    compression: float = 0.0
    communication: float = 0.0
    latency: float = 0.0
    """Of the message by which the times are agreed."""
    rest: float = -1.0
    """From the end of this step's exchange to the start of the next; below 0: not known."""
    wire_bytes: float = 0.0
    num_collectives: float = 0.0
    density: float = 1.0
    target: float = 1.0
    is_dense: float = 0.0
    predicted: float = 0.0
    """Seconds of the exchange, as the model had it; 0: not known."""


@dataclass
class StepMarks:
    """When a step's exchange began and ended on this worker, and what it sent."""

    begin: Mark
    agreed: tuple[Mark, Mark]
    comm: TimedComm
    counted: tuple[float, float]
    """The bytes and collectives before, then of the step."""
    target: float
    is_dense: bool
    predicted: float
    end: Mark = None
    next_begin: Mark = None
    density: float = 1.0

    def times(self, watch: Stopwatch) -> StepTimes:
        latency = watch.seconds(*self.agreed)
        communication = sum(watch.seconds(*span) for span in self.comm.spans)
        compression = watch.seconds(self.begin, self.end) - communication - latency
        rest = -1.0 if self.next_begin is None else watch.seconds(self.end, self.next_begin)
        sent = (*self.counted, self.density, self.target, float(self.is_dense), self.predicted)
        return StepTimes(compression, communication, latency, rest, *sent)


def ledger_of(comm: Communicator) -> tuple[float, float]:
    """The bytes and collectives so far."""
    assert isinstance(comm, CountingComm)
    return comm.ledger.wire_bytes, float(comm.ledger.num_collectives)
