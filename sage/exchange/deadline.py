"""Waiting for a device, but not for ever.

A collective under NCCL is enqueued, not done. Where a peer is lost it never ends, and with it everything that
is enqueued after it: whoever waits for the device then waits for ever.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sage.interfaces import CommunicationError

SPIN_SECONDS = 0.005
"""A wait this short is not slept through: a sleep would take longer than most waits do."""
SLEEP_SECONDS = 0.001
POLL_SECONDS = 1.0
"""How often the watch looks at what is unfinished."""


class Event(Protocol):
    """A point in the device's work, as torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether all work before it is done; does not wait."""


class Collective(NamedTuple):
    """One that was enqueued."""

    name: str
    end: Event
    enqueued_at: float


def record_event(device: torch.device) -> Event:
    """The point that the work of a device's current stream has come to. The current device may be another."""
    event: Event = torch.cuda.current_stream(device).record_event()
    return event


def copy_to_host(x: Tensor) -> tuple[Tensor, Event]:
    """A copy of x in the host's memory, which is complete after the event."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    return host, record_event(x.device)


class Deadline:
    """How long a worker waits for what it enqueued; one for all its communicators and its clock.

    wait and read raise CommunicationError after it. Other waits for the device (an .item(), a copy from or to
    it) cannot be left: for them there is watched, whose thread ends the run.
    """

    def __init__(
        self,
        timeout_seconds: float,
        device_type: str = "cuda",
        record: Callable[[torch.device], Event] = record_event,
        copy: Callable[[Tensor], tuple[Tensor, Event]] = copy_to_host,
    ) -> None:
        """device_type: where collectives are only enqueued."""
        self.timeout_seconds = timeout_seconds
        self._device_type, self._record, self._copy = device_type, record, copy
        self._lock = threading.Lock()
        self._unfinished: deque[Collective] = deque()  # and finished ones that nobody has looked at
        self._is_waiting = False  # in wait, which knows the deadline itself
        self._is_lost = False  # the watch has found a lost collective, and ends the process

    def applies_to(self, x: Tensor) -> bool:
        """Whether work on x is only enqueued."""
        return x.device.type == self._device_type

    def enqueued(self, name: str, device: torch.device) -> None:
        """Note that a collective was enqueued in a device's current stream."""
        with self._lock:
            self._drop_finished()
            self._unfinished.append(Collective(name, self._record(device), time.monotonic()))

    def read(self, x: Tensor) -> Tensor:
        """A copy of x on the host. Raises CommunicationError."""
        if not self.applies_to(x):
            return x.cpu()
        host, end = self._copy(x)
        self.wait(end)
        return host

    def wait(self, event: Event) -> None:
        """Wait for an event. Raises CommunicationError, which names the collective that does not end."""
        started = time.monotonic()
        self._set_waiting(True)
        while not event.query():
            waited = time.monotonic() - started
            if waited > self.timeout_seconds and not self._is_lost:
                raise self._error()
            time.sleep(0 if waited < SPIN_SECONDS else SLEEP_SECONDS)
        self._set_waiting(False)

    @contextmanager
    def watched(
        self, on_lost: Callable[[CommunicationError], object], poll_seconds: float = POLL_SECONDS
    ) -> Iterator[None]:
        """In here on_lost(error) is called, in a thread, once a collective has not ended in time while the
        host waits for it elsewhere than in wait."""
        is_left = threading.Event()

        def watch() -> None:
            while not is_left.wait(poll_seconds):
                if self._has_lost():
                    on_lost(self._error())
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            is_left.set()

    def _has_lost(self) -> bool:
        """Whether the oldest unfinished collective is overdue, and nobody is in wait.

        Asks an event only when it is old: CUDA forbids that while another thread captures a graph.
        """
        with self._lock:
            while not self._is_waiting and self._is_overdue():
                if not self._unfinished[0].end.query():
                    self._is_lost = True
                    break
                self._unfinished.popleft()
            return self._is_lost

    def _is_overdue(self) -> bool:
        """Whether the oldest collective that may be unfinished was enqueued too long ago."""
        if not self._unfinished:
            return False
        return time.monotonic() - self._unfinished[0].enqueued_at > self.timeout_seconds

    def _set_waiting(self, is_waiting: bool) -> None:
        with self._lock:
            self._is_waiting = is_waiting

    def _drop_finished(self) -> None:
        while self._unfinished and self._unfinished[0].end.query():
            self._unfinished.popleft()

    def _error(self) -> CommunicationError:
        with self._lock:
            self._drop_finished()
            name = self._unfinished[0].name if self._unfinished else "the device's work"
        return CommunicationError(f"{name} failed: it did not end within {self.timeout_seconds:g} s")
