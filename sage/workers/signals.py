"""Signals that end a run early: what came, who is to be told, and what a process does at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Signals

ENDING = (Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGINT, Signals.SIGHUP, Signals.SIGQUIT)
"""SIGUSR1 is SLURM's warning before the time limit, as pararun asks for it."""

Send = Callable[[Signals], object]


class SignalWatch:
    """What the process does with the signals that end a run.

    Until the workers have met, SIGUSR1 alone is noted, and ends the run after its first step; the others end
    the process at once. From then on all are noted, but a second Ctrl-C (SIGINT) or a SIGQUIT ends the
    process at once: from a thread, since Python's own handlers wait where a collective waits. A process
    whose work is done by others hands on to them all that comes.
    """

    def __init__(self) -> None:
        self.received: Signals | None = None
        """The first."""
        self._num_interrupts = 0
        self._is_deferring = False
        self._send: Send | None = None
        self._pipe: tuple[int, int] | None = None

    def listen(self) -> None:
        """Take the signals, but those that this process was started to ignore (nohup). Main thread only."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # not the default; _watch reads the number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # what came while a parent held them comes now

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What comes is noted in `received`."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False

    @contextmanager
    def handed_on(self, send: Send) -> Iterator[None]:
        """What comes is handed to send. Listens."""
        self.listen()
        self._send = send
        try:
            yield
        finally:
            self._send = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Processes that are started in here get what comes when they listen, not before."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 1):
            self._take(Signals(numbers[0]))

    def _take(self, number: Signals) -> None:
        self.received = self.received or number
        self._num_interrupts += number == Signals.SIGINT
        at_once = number == Signals.SIGQUIT or self._num_interrupts > 1
        if not self._is_deferring:
            at_once = number != Signals.SIGUSR1
        if self._send is not None:
            self._send(number)
        elif at_once:
            os._exit(128 + number)


WATCH = SignalWatch()
"""The process's; it does nothing until it listens."""
