"""Where the time goes: seconds by phase, with no synchronisation per phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sage.exchange.deadline import Deadline

Moment = float | torch.cuda.Event
"""A point in time: seconds, or on a GPU a point of a stream."""


class Stopwatch:
    """Tells moments, and the seconds between two of them. On a GPU a moment is a CUDA event."""

    def __init__(
        self,
        device: torch.device,
        deadline: Deadline | None = None,
        host_seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        """deadline: for waiting for a GPU; None: for ever. host_seconds: since some moment."""
        self.on_gpu = device.type == "cuda"
        self._deadline, self._host_seconds = deadline, host_seconds

    def now(self) -> Moment:
        """This moment; on a GPU the point that its current stream has come to."""
        if not self.on_gpu:
            return self._host_seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Moment, end: Moment) -> float:
        """Seconds; negative where end was before begin. On a GPU this waits for the end, and raises
        CommunicationError where that does not come in time."""
        if isinstance(begin, float):
            assert isinstance(end, float)
            return end - begin
        assert not isinstance(end, float)
        if self._deadline is None:
            end.synchronize()
        else:
            self._deadline.wait(end)
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000


class Clock(Stopwatch):
    """Adds up the seconds spent in named phases.

    One phase counts at a time: one that begins within another interrupts it. So the phases within an
    outermost one divide its time among them, and leave out none of it. A part (of communication, say) is
    counted besides, and interrupts nothing. One thread at a time may use a clock.

    On a GPU take() reads the moments, and waits for them.
    """

    def __init__(
        self,
        device: torch.device,
        deadline: Deadline | None = None,
        host_seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(device, deadline, host_seconds)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._waiting: list[tuple[str, Moment, Moment]] = []  # of a GPU, not yet read
        self._open: list[str] = []  # the phases that have begun, the innermost last
        self._since: Moment = 0.0  # until when the innermost one is counted
        self._taken_at = host_seconds()

    @property
    def taken_at(self) -> float:
        """When take() was last called, by the host."""
        return self._taken_at

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the with-block under a name, but for those of phases within it."""
        self._count_innermost()
        self._open.append(name)
        try:
            yield
        except BaseException:
            self._open.pop()  # and no event: a GPU may have failed
            raise
        self._count_innermost()
        self._open.pop()

    def become(self, name: str) -> Moment:
        """Count the innermost open phase under another name from now on; returns this moment."""
        self._count_innermost()
        self._open[-1] = name
        return self._since

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds of the with-block under a name, beside the phase that they belong to."""
        begin = self.now()
        yield
        self.add(name, begin, self.now())

    def add(self, name: str, begin: Moment, end: Moment) -> None:
        """Count the seconds from one moment to another under a name."""
        if self.on_gpu:
            self._waiting.append((name, begin, end))
        else:
            self._seconds[name] += self.between(begin, end)

    def take(self) -> dict[str, float]:
        """The seconds by name since the last call, also of phases that have not ended. On a GPU this waits
        for its work, and raises CommunicationError where that does not end in time."""
        if self._open:
            self._count_innermost()
        for name, begin, end in self._waiting:
            self._seconds[name] += self.between(begin, end)
        self._waiting.clear()
        since = self._since
        self._taken_at = since if self._open and isinstance(since, float) else self._host_seconds()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _count_innermost(self) -> None:
        """Count the innermost open phase, if any, up to now."""
        now = self.now()
        if self._open:
            self.add(self._open[-1], self._since, now)
        self._since = now


class HiddenClock(Clock):
    """Times a thread that exchanges while backward computes, beside the clock of the step.

    take() gives the other clock's seconds and of the thread's own: `communicate`, what collectives took after
    backward had computed the last gradient, and `hidden`, what the exchange took before that. Seconds of a
    thread that waits for a core are in both.
    """

    EXCHANGE = "exchange"
    """The part of a step that is all that the thread does in it."""

    def __init__(self, main: Clock) -> None:
        self.on_gpu, self._deadline, self._main = main.on_gpu, main._deadline, main
        self._host_seconds = main._host_seconds
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._steps: list[tuple[Moment, list[tuple[str, Moment, Moment]]]] = []

    @property
    def taken_at(self) -> float:
        return self._main.taken_at

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
                whole = self.between(begin, end)
                before = min(max(self.between(begin, computed), 0.0), whole)
                if name == "communicate":
                    taken["communicate"] += whole - before
                elif name == self.EXCHANGE:
                    taken["hidden"] += before
        self._steps.clear()
        return self._main.take() | taken
