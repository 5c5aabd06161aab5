"""The meeting point of threads of one process: LocalComm's collectives take place there."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sage.interfaces import CommunicationError

Result = TypeVar("Result")


class ThreadRoom:
    """Lets world_size threads combine their values: the last thread to arrive does it for all."""

    def __init__(self, world_size: int, timeout_seconds: float) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._condition = threading.Condition()
        self._brought: dict[int, tuple[str, Any]] = {}
        self._generation = 0
        self._result: Any = None
        self._ended: set[int] = set()
        self._error: str | None = None

    def meet(self, rank: int, call: str, x: Any, combine: Callable[[list[Any]], Result]) -> Result:
        """Combine every worker's x, in rank order; all workers get the same object. Raises
        CommunicationError."""
        with self._condition:
            self.check(f"worker {rank} calls {call}")  # after a failure the calls no longer match
            generation = self._generation
            self._brought[rank] = (call, x)
            if self._ended:
                self.fail(f"worker {min(self._ended)} has ended")
            elif len(self._brought) == self.world_size:
                self._finish(combine)
            arrived = self._condition.wait_for(
                lambda: self._generation != generation or self._error is not None, self.timeout_seconds
            )
            if self._generation != generation:
                result: Result = self._result
                return result
            if not arrived:
                missing = sorted(set(range(self.world_size)) - set(self._brought))
                self.fail(f"workers {missing} did not come within {self.timeout_seconds:g} s")
            raise CommunicationError(f"worker {rank} waits in {call}: {self._error}")

    def leave(self, rank: int) -> None:
        """Mark a worker as ended: the others' next meeting fails."""
        with self._condition:
            self._ended.add(rank)
            if self._brought:
                self.fail(f"worker {rank} has ended")

    def check(self, where: str) -> None:
        """Raise CommunicationError where the room has failed."""
        if self._error is not None:
            raise CommunicationError(f"{where}: {self._error}")

    def fail(self, error: str) -> None:
        """Raise an error in all threads that wait, or come later."""
        with self._condition:
            self._error = self._error or error
            self._brought = {}
            self._condition.notify_all()

    def _finish(self, combine: Callable[[list[Any]], Any]) -> None:
        calls = {call for call, _ in self._brought.values()}
        if len(calls) > 1:
            described = ", ".join(
                f"worker {rank}: {call}" for rank, (call, _) in sorted(self._brought.items())
            )
            self.fail(f"workers called different collectives ({described})")
            return
        self._result = combine([self._brought[rank][1] for rank in range(self.world_size)])
        self._brought = {}
        self._generation += 1
        self._condition.notify_all()
