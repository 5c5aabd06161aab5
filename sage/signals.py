"""Signals that end a run early: what came, who is to be told, and what a process does at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Signals

ENDING = (Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGINT, Signals.SIGHUP, Signals.SIGQUIT)
"""SIGUSR1 is SLURM's warning before the time limit, as pararun asks for it."""
AT_ONCE = (Signals.SIGQUIT,)

Send = Callable[[Signals], object]


class SignalWatch:
    """What the process does with the signals that end a run.

    Before a run trains, Ctrl-C (SIGINT) and SIGQUIT end the process at once; the others are noted, and end
    the run after its first step. While it trains they are noted all, but a second Ctrl-C or a SIGQUIT ends
    the process at once: from a thread, since Python's own handlers wait where a collective waits. A process
    whose work is done by others hands on to them all that comes.
    """

    def __init__(self) -> None:
        self.received: Signals | None = None
        """The first."""
        self._num_deferring = 0
        self._send: Send | None = None
        self._pipe: tuple[int, int] | None = None

    def listen(self) -> None:
        """Take the signals, from the main thread; what another part took since is taken back."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, lambda *_: None)  # not the default; _watch reads the number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What comes is noted in `received`; may nest, and be entered by several threads."""
        self._num_deferring += 1
        try:
            yield
        finally:
            self._num_deferring -= 1

    @contextmanager
    def handed_on(self, send: Send) -> Iterator[Callable[[], None]]:
        """What comes is handed to send. The function that this yields, to be called when there is somebody to
        send to, hands on what came before. Listens."""

        def catch_up() -> None:
            if self.received is not None:
                send(self.received)

        self.listen()
        self._send = send
        try:
            yield catch_up
        finally:
            self._send = None

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 1):
            self._take(Signals(numbers[0]))

    def _take(self, number: Signals) -> None:
        again, self.received = self.received is not None, self.received or number
        if self._send is not None:
            self._send(number)
        elif number in AT_ONCE or (number == Signals.SIGINT and (again or not self._num_deferring)):
            os._exit(128 + number)


WATCH = SignalWatch()
"""The process's; it does nothing until it listens."""
