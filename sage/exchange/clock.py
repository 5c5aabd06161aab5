"""Where the time goes: seconds by phase, with no synchronisation per phase."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sage.exchange.deadline import Deadline


class Clock:
    """Adds up the seconds spent in named phases.

    On a GPU a phase is a pair of CUDA events, read by take(), which waits for them; elsewhere it is wall
    time. Phases may nest (communicate inside reduce); each counts its own whole time.
    """

    def __init__(self, device: torch.device, deadline: Deadline | None = None) -> None:
        """deadline: for waiting for a GPU; None: take() waits for ever."""
        self.on_gpu = device.type == "cuda"
        self._deadline = deadline
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the with-block under a name."""
        if self.on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last call. On a GPU this waits for the work of these phases, and
        raises CommunicationError where it does not end in time."""
        for name, begin, end in self._events:
            self._wait(end)
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _wait(self, event: torch.cuda.Event) -> None:
        if self._deadline is None:
            event.synchronize()
        else:
            self._deadline.wait(event)
