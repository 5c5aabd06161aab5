"""Run a sweep's points, each in a process of its own. Imports no torch."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from sage import sweep
from sage.console import complain
from sage.sweep import RUN_LOCK, SWEEP_LOCK, Point
from sage.workers.signals import WATCH

POLL_SECONDS = 0.1


@dataclass
class Job:
    """A point's process."""

    point: Point
    process: subprocess.Popen[bytes]
    lock: int
    """The descriptor of the point's locked file."""


class PointRunner:
    """Runs those points of a sweep that are not done, and that no other process is running.

    A point that fails does not keep the next from running. Points that other processes run are skipped, and
    looked at again when the others have had their turn. A signal is sent on to the point's process, once, and
    ends the sweep.
    """

    def __init__(
        self, points: Sequence[Point], runs: Path, is_done: Callable[[Point], bool], command: Sequence[str]
    ) -> None:
        """The process of point I is `python COMMAND --index I`."""
        self._points, self._runs, self._is_done, self._command = points, runs, is_done, command
        self._waiting = list(points)
        self._jobs: list[Job] = []
        self._failed: list[Point] = []
        self._skipped: set[int] = set()
        """The indices of points that were said to be run elsewhere."""
        self._starting = threading.Lock()
        """Held while a process starts, so that a signal that comes meanwhile reaches it."""

    def run(self) -> int:
        """Run the points; returns the exit code."""
        with WATCH.handed_on(self._send):
            self._start_next()
            while self._jobs:
                time.sleep(POLL_SECONDS)
                if self._collect_ended():
                    self._start_next()
        return self._conclude() if WATCH.received is None else 128 + WATCH.received

    def _start_next(self) -> None:
        """Start the next point that can be run."""
        for point in list(self._waiting):
            if self._jobs or WATCH.received is not None:
                return
            if self._is_done(point):
                self._waiting.remove(point)
                self._say(point, "is done")
            elif self._try_to_start(point):
                self._waiting.remove(point)

    def _try_to_start(self, point: Point) -> bool:
        """Start a point's process; False: another process runs the point, which may be tried again later."""
        try:
            lock = self._lock(point)
        except OSError as error:
            complain(f"point {point.index}: {error}")
            self._failed.append(point)
            return True
        if lock is not None:
            self._start(point, lock)
        return lock is not None

    def _lock(self, point: Point) -> int | None:
        """Lock a point's folder for this sweep; None: another process runs the point, which is said once.

        Raises OSError where the folder cannot be made.
        """
        folder = self._runs / point.folder
        lock = sweep.lock(folder, SWEEP_LOCK)
        who = sweep.holder(folder, [SWEEP_LOCK] if lock is None else [RUN_LOCK])
        if lock is not None and not who:
            return lock
        if lock is not None:
            os.close(lock)
        if point.index not in self._skipped:
            self._skipped.add(point.index)
            self._say(point, f"is skipped: {who or 'another process'} runs it")
        return None

    def _start(self, point: Point, lock: int) -> None:
        self._say(point)
        command = [sys.executable, *self._command, "--index", str(point.index)]
        with self._starting, WATCH.held():
            if WATCH.received is not None:  # it has been sent on already
                os.close(lock)
                return
            # A session of its own: Ctrl-C reaches it from here only, and so only once.
            process = subprocess.Popen(command, start_new_session=True)
            self._jobs.append(Job(point, process, lock))

    def _send(self, number: Signals) -> None:
        with self._starting:
            for job in list(self._jobs):
                job.process.send_signal(number)

    def _collect_ended(self) -> bool:
        """Take note of the processes that have ended; whether there are any."""
        ended = [job for job in self._jobs if job.process.poll() is not None]
        for job in ended:
            self._jobs.remove(job)
            if job.process.returncode != 0 and WATCH.received is None:
                self._note_failure(job.point)
            os.close(job.lock)
        return bool(ended)

    def _note_failure(self, point: Point) -> None:
        """A process failed: its point has, too, unless another process has run it meanwhile, or does so."""
        if self._is_done(point):
            return
        if sweep.holder(self._runs / point.folder, [RUN_LOCK]):
            self._waiting.append(point)
        else:
            self._failed.append(point)

    def _conclude(self) -> int:
        """Say which points failed and which are being run elsewhere; returns the exit code."""
        total = len(self._points)
        if self._waiting:
            count = f"{len(self._waiting)} of {total} points"
            print(f"{count} are being run by other processes: {_indices(self._waiting)}", flush=True)
        if self._failed:
            count = f"{len(self._failed)} of {total} points"
            print(f"run.py: {count} failed: {_indices(self._failed)}", file=sys.stderr)
        return 1 if self._failed else 0

    def _say(self, point: Point, what: str = "") -> None:
        print(f"point {point.index} of {len(self._points)}: {point} {what}".rstrip(), flush=True)


def _indices(points: Sequence[Point]) -> str:
    return ", ".join(str(point.index) for point in points)
