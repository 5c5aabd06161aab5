"""Run a sweep's points, each in a process of its own: one after the other, or side by side."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from sage import sweep
from sage.console import complain
from sage.sweep import RUN_LOCK, SWEEP_LOCK, Point
from sage.workers import shares
from sage.workers.signals import WATCH

POLL_SECONDS = 0.1
LOG = "output.log"
"""A file in a point's folder: what its processes say while other points run beside it."""


@dataclass
class Job:
    """A point's process."""

    point: Point
    slot: int
    process: subprocess.Popen[bytes]
    lock: int
    """The descriptor of the point's locked file."""
    started: float
    log: Path | None
    """Where its output goes; None: to the terminal."""
    log_start_bytes: int
    """How much is in the log from earlier processes."""

    def last_words(self) -> str:
        """The last line that run.py complained of in the log; else its last line."""
        assert self.log is not None
        new = self.log.read_bytes()[self.log_start_bytes :].decode(errors="replace")
        lines = [line for line in new.splitlines() if line.strip()]
        complaints = [line.removeprefix("run.py: ") for line in lines if line.startswith("run.py: ")]
        return (complaints or lines or ["it said nothing"])[-1]


class PointRunner:
    """Runs those points of a sweep that are not done, and that no other process is running.

    A point that fails does not keep the next from running. Points that other processes run are skipped, and
    looked at again when the others have had their turn. A signal is sent on to the points' processes, once,
    and ends the sweep.

    With several jobs, that many points run side by side, each on its share of the GPUs and the cores. Cores
    are not divided where the number of threads is given: more threads than cores would wait for one another.
    """

    def __init__(
        self,
        points: Sequence[Point],
        runs: Path,
        is_done: Callable[[Point], bool],
        command: Sequence[str],
        num_jobs: int = 1,
        *,
        to_logs: bool = False,
        divides_cpus: bool = True,
    ) -> None:
        """The process of point I is `python COMMAND --index I`. to_logs: its output goes into its folder."""
        self._points, self._runs, self._is_done, self._command = points, runs, is_done, command
        self._num_jobs, self._to_logs = num_jobs, to_logs
        self._cpus = shares.own_cpus() if divides_cpus and num_jobs > 1 else []
        self._gpus = shares.own_gpus() if num_jobs > 1 else []
        self._waiting = list(points)
        self._jobs: list[Job] = []
        self._failed: list[Point] = []
        self._stopped: list[Point] = []
        """Points that a signal of their own ended early."""
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
        """Start as many of the next points as there are free slots."""
        for point in list(self._waiting):
            if len(self._jobs) == self._num_jobs or WATCH.received is not None:
                return
            if self._is_done(point):
                self._waiting.remove(point)
                self._say(point, f"{point} is done")
            elif self._try_to_start(point):
                self._waiting.remove(point)

    def _try_to_start(self, point: Point) -> bool:
        """Start a point's process; False: another process runs the point, which may be tried again later."""
        try:
            lock = self._lock(point)
            if lock is not None:
                self._start(point, lock)
        except OSError as error:
            complain(f"point {point.index}: {error}")
            self._failed.append(point)
            return True
        return lock is not None

    def _lock(self, point: Point) -> int | None:
        """Lock a point's folder for this sweep; None: another process runs the point, which is said once.

        Raises OSError where the folder cannot be made.
        """
        folder = self._runs / point.folder
        who = sweep.holder(folder)
        lock = None if who else sweep.lock(folder, SWEEP_LOCK)
        if lock is None and point.index not in self._skipped:
            self._skipped.add(point.index)
            self._say(point, f"{point} is skipped: {who or 'another process'} runs it")
        return lock

    def _start(self, point: Point, lock: int) -> None:
        """Start the process of a point whose folder is locked. Raises OSError."""
        self._say(point, str(point))
        try:
            with self._starting, WATCH.held():
                if WATCH.received is None:
                    self._jobs.append(self._start_process(point, lock))
                else:  # the signal has been sent on already
                    os.close(lock)
        except OSError:
            os.close(lock)
            raise

    def _start_process(self, point: Point, lock: int) -> Job:
        """A session of its own: Ctrl-C reaches the process from here only, and so only once."""
        slot = min(set(range(self._num_jobs)) - {job.slot for job in self._jobs})
        cpus, gpus = shares.share(slot, self._num_jobs, self._cpus, self._gpus)
        log = self._runs / point.folder / LOG if self._to_logs else None
        started = time.monotonic()
        with log.open("ab") if log else nullcontext() as output, shares.on_cpus(cpus):
            log_start_bytes = output.tell() if output else 0
            process = subprocess.Popen(
                [sys.executable, "-u", *self._command, "--index", str(point.index)],
                stdout=output,
                stderr=output,
                env=shares.environment(gpus),
                start_new_session=True,
            )
        return Job(point, slot, process, lock, started, log, log_start_bytes)

    def _send(self, number: Signals) -> None:
        with self._starting:
            for job in list(self._jobs):
                job.process.send_signal(number)

    def _collect_ended(self) -> bool:
        """Take note of the processes that have ended; whether there are any."""
        ended = [job for job in self._jobs if job.process.poll() is not None]
        for job in ended:
            self._jobs.remove(job)
            if job.log is not None:
                seconds = time.monotonic() - job.started
                code = f"exit code {job.process.returncode} after {seconds:.1f} s"
                self._say(job.point, f"ended with {code}: {job.log.parent}")
            if WATCH.received is None:
                self._note_end(job)
            os.close(job.lock)
        return bool(ended)

    def _note_end(self, job: Job) -> None:
        """Count a point that is not done as failed or stopped, unless another process runs it."""
        if self._is_done(job.point):
            return
        if job.process.returncode == 0:
            self._stopped.append(job.point)
            return
        if sweep.holder(self._runs / job.point.folder, [RUN_LOCK]):
            self._waiting.append(job.point)
            return
        self._failed.append(job.point)
        if job.log is not None:
            complain(f"point {job.point.index}: {job.last_words()} (see {job.log})")

    def _conclude(self) -> int:
        """Say which points failed and which are being run elsewhere; returns the exit code."""
        total = len(self._points)
        if self._waiting:
            count = f"{len(self._waiting)} of {total} points"
            print(f"{count} are being run by other processes: {_indices(self._waiting)}", flush=True)
        if self._stopped:
            count = f"{len(self._stopped)} of {total} points"
            print(f"{count} were stopped and are not done: {_indices(self._stopped)}", flush=True)
        if self._failed:
            count = f"{len(self._failed)} of {total} points"
            print(f"run.py: {count} failed: {_indices(self._failed)}", file=sys.stderr)
        return 1 if self._failed else 0

    def _say(self, point: Point, what: str) -> None:
        print(f"point {point.index} of {len(self._points)}: {what}", flush=True)


def _indices(points: Sequence[Point]) -> str:
    return ", ".join(str(point.index) for point in points)
