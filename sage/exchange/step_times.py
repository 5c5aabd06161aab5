"""How long a step's exchange takes on this worker: compression, communication, and what it sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sage.exchange.clock import Moment, Stopwatch
from sage.exchange.comm import CountingComm
from sage.interfaces import Communicator


class TimedComm(Communicator):
    """Notes when another communicator's collectives begin and end."""

    def __init__(self, comm: Communicator, watch: Stopwatch) -> None:
        self.rank, self.world_size = comm.rank, comm.world_size
        self._comm, self._watch = comm, watch
        self.spans: list[tuple[Moment, Moment]] = []

    @contextmanager
    def _noted(self) -> Iterator[None]:
        begin = self._watch.now()
        yield
        self.spans.append((begin, self._watch.now()))

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        with self._noted():
            self._comm.all_reduce(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._noted():
            return self._comm.all_gather(x)

    def all_gather_ragged(self, x: Tensor) -> list[Tensor]:
        with self._noted():
            return self._comm.all_gather_ragged(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        with self._noted():
            return self._comm.all_to_all(x)

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

    begin: Moment
    agreed: tuple[Moment, Moment]
    comm: TimedComm
    counted: tuple[float, float]
    """The bytes and collectives before, then of the step."""
    target: float
    is_dense: bool
    predicted: float
    end: Moment | None = None
    next_begin: Moment | None = None
    density: float = 1.0

    def times(self, watch: Stopwatch) -> StepTimes:
        assert self.end is not None
        latency = watch.between(*self.agreed)
        communication = sum(watch.between(*span) for span in self.comm.spans)
        compression = watch.between(self.begin, self.end) - communication - latency
        rest = -1.0 if self.next_begin is None else watch.between(self.end, self.next_begin)
        sent = (*self.counted, self.density, self.target, float(self.is_dense), self.predicted)
        return StepTimes(compression, communication, latency, rest, *sent)


def ledger_of(comm: Communicator) -> tuple[float, float]:
    """The bytes and collectives so far."""
    assert isinstance(comm, CountingComm)
    return comm.ledger.wire_bytes, float(comm.ledger.num_collectives)
