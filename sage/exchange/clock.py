"""Where the time goes: seconds by phase, with no synchronisation per phase."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sage.exchange.deadline import Deadline

Moment = float | torch.cuda.Event
"""A point in time: seconds, or on a GPU a point of a stream."""


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
        self._events: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the with-block under a name."""
        begin = self.now()
        yield
        self.add(name, begin, self.now())

    def now(self) -> Moment:
        """This moment; on a GPU the point that its current stream has come to."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Moment, end: Moment) -> None:
        """Count the seconds from one moment to another under a name."""
        if self.on_gpu:
            self._events.append((name, begin, end))
        else:
            self._seconds[name] += self._between(begin, end)

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last call. On a GPU this waits for the work of these phases, and
        raises CommunicationError where it does not end in time."""
        for name, begin, end in self._events:
            self._seconds[name] += self._between(begin, end)
        self._events.clear()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _between(self, begin: Moment, end: Moment) -> float:
        """Seconds; negative where end was before begin. On a GPU this waits for the end."""
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert not isinstance(begin, float)
        assert not isinstance(end, float)
        self._wait(end)
        return float(begin.elapsed_time(end)) / 1000

    def _wait(self, event: torch.cuda.Event) -> None:
        if self._deadline is None:
            event.synchronize()
        else:
            self._deadline.wait(event)


class HiddenClock(Clock):
    """Times a thread that exchanges while backward computes, beside the clock of the step.

    take() gives the other clock's seconds and of the thread's own: `communicate`, what collectives took after
    backward had computed the last gradient, and `hidden`, what the exchange took before that. Seconds of a
    thread that waits for a core are in both.
    """

    EXCHANGE = "exchange"
    """The phase of all that the thread does in a step."""

    def __init__(self, main: Clock) -> None:
        self.on_gpu, self._deadline, self._main = main.on_gpu, main._deadline, main
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._steps: list[tuple[Moment, list[tuple[str, Moment, Moment]]]] = []

    def add(self, name: str, begin: Moment, end: Moment) -> None:
        self._spans.append((name, begin, end))

    def end_step(self, computed: Moment) -> None:
        """A step's exchange is done. computed: when backward had computed the last gradient."""
        self._steps.append((computed, self._spans))
        self._spans = []

    def take(self) -> dict[str, float]:
        taken = {"communicate": 0.0, "hidden": 0.0} if self._steps else {}
        for computed, spans in self._steps:
            for name, begin, end in spans:
                whole = self._between(begin, end)
                before = min(max(self._between(begin, computed), 0.0), whole)
                if name == "communicate":
                    taken["communicate"] += whole - before
                elif name == self.EXCHANGE:
                    taken["hidden"] += before
        self._steps.clear()
        return self._main.take() | taken
