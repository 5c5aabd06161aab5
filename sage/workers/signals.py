"""Signals that end a run early: noted until the run can stop, or passed on to the processes that run it."""

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
    """Decides what the process does with a signal that ends a run.

    Until the workers have met, only SIGUSR1 is noted, and ends the run after its first step; other signals
    end the process at once. From then on all are noted, but a second Ctrl-C (SIGINT) or a SIGQUIT ends the
    process at once: from a thread, since Python runs no handler while a collective waits. A process whose
    work is done by other processes passes every signal on to them.
    """

    def __init__(self) -> None:
        self.received: Signals | None = None
        """The first signal that came."""
        self._num_interrupts = 0
        self._is_deferring = False
        self._send: Send | None = None
        self._pipe: tuple[int, int] | None = None

    def listen(self) -> None:
        """Handle the signals, except those that this process was started to ignore (nohup). To be called in
        the main thread."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # replaces the default; _watch reads the number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # signals that a parent held back arrive now

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal is noted in `received`."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False

    @contextmanager
    def handed_on(self, send: Send) -> Iterator[None]:
        """Listen; in here a signal is passed to send."""
        self.listen()
        self._send = send
        try:
            yield
        finally:
            self._send = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """A process that is started in here gets its signals once it listens, not before."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 1):
            self._handle(Signals(numbers[0]))

    def _handle(self, number: Signals) -> None:
        self.received = self.received or number
        if number == Signals.SIGINT:
            self._num_interrupts += 1
        if self._send is not None:
            self._send(number)
        elif self._ends_at_once(number):
            os._exit(128 + number)

    def _ends_at_once(self, number: Signals) -> bool:
        if not self._is_deferring:
            return number != Signals.SIGUSR1
        return number == Signals.SIGQUIT or self._num_interrupts > 1


WATCH = SignalWatch()
"""This process's watch; it does nothing until it listens."""
