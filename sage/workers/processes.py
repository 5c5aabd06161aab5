"""The worker processes that --workers starts: started together, ended together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

POLL_SECONDS = 0.2
"""How often the parent looks whether its workers have ended."""
END_SECONDS = 30.0
"""How long workers may take to end after SIGTERM; then they are killed."""


class WorkerProcesses:
    """The processes of a run's workers, by rank.

    Each is of a session of its own, so that Ctrl-C reaches it once: through this process.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._starting = threading.Lock()
        """Held while processes start, so that a signal that comes meanwhile reaches all of them."""

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Start `python COMMAND` once in each environment. Raises OSError."""
        with self._starting:
            for environment in environments:
                words = [sys.executable, "-u", *command]
                self._processes.append(subprocess.Popen(words, env=environment, start_new_session=True))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each that still runs."""
        with self._starting:
            for process in self._processes:
                process.send_signal(number)

    def wait(self) -> tuple[int, int] | None:
        """Wait until one has failed, or all have ended well; returns the rank and the exit code of the one
        that failed. The code of one that a signal killed is less than 0."""
        while True:
            codes = [process.poll() for process in self._processes]
            failures = [(rank, code) for rank, code in enumerate(codes) if code]
            if failures:
                return failures[0]
            if None not in codes:
                return None
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End those that still run, and what they have started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + END_SECONDS
            running = [process for process in self._processes if process.poll() is None]
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
