"""Runs checks in another process, within a time limit: one that fails, hangs or crashes costs its own rows.

An illegal access in a kernel makes every later call of its process fail, and a collective may wait for ever;
so the checks run in a process that is killed and started again where that happens.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from benchmarks.gpu.checks import Check, Row, Section, Setup

LEAST_SECONDS = 3.0
"""A check that has less time than this is left out."""
START_SECONDS = 60.0
"""How long a process may take to import torch and to find the device."""
KILL_SECONDS = 5.0
"""Between SIGTERM, which lets runs end their workers, and SIGKILL."""


def run_sections(
    sections: Sequence[Section],
    setup: Setup,
    limit_seconds: float,
    show: Callable[[str, Sequence[Row]], None],
) -> dict[str, list[Row]]:
    """Run all checks of all sections, in order, and return their rows by section.

    limit_seconds: for all of them together; checks for which no time is left become rows that say so. show is
    called with a section's name and the rows of each check as soon as they are there.
    """
    ends_at = time.monotonic() + limit_seconds
    results: dict[str, list[Row]] = {}
    with _Process.started(sections, setup) as process:
        for number, section in enumerate(sections):
            if section.fresh and not setup.small:  # small ones take less time than a process to start
                process.restart()
            reserved = sum(later.seconds for later in sections[number + 1 :])
            section_ends_at = max(ends_at - reserved, min(ends_at, time.monotonic() + section.seconds))
            rows = results[section.name] = []
            for index, check in enumerate(section.checks(setup)):
                left = section_ends_at - time.monotonic()
                found = _run_check(process, (number, index), check, left, setup.patience)
                rows += found
                show(section.name, found)
    return results


def _run_check(
    process: "_Process", which: tuple[int, int], check: Check, seconds: float, patience: float
) -> list[Row]:
    if seconds < LEAST_SECONDS:
        return [{"check": check.name, "left out": "no time was left for it"}]
    return process.measure(which, check.name, min(seconds, patience * check.seconds))


class _Answer(NamedTuple):
    """What the process sends back after a check."""

    rows: list[Row]
    healthy: bool
    """Whether its next check can be trusted."""


class _Process:
    """The process in which the checks run."""

    def __init__(self, sections: Sequence[Section], setup: Setup) -> None:
        self._given = (sections, setup)
        self._context = multiprocessing.get_context("spawn")
        self._is_ready = False  # has answered since it was started
        self._start()

    @classmethod
    @contextmanager
    def started(cls, sections: Sequence[Section], setup: Setup) -> Iterator["_Process"]:
        """A process that is ended after the with-block."""
        process = cls(sections, setup)
        try:
            yield process
        finally:
            process.end()

    def measure(self, which: tuple[int, int], name: str, seconds: float) -> list[Row]:
        """The rows of a check. Where it fails, one row that says how."""
        self._pipe.send(which)
        try:
            if not self._pipe.poll(seconds + (0 if self._is_ready else START_SECONDS)):
                self.restart()
                return [{"check": name, "failed": f"took longer than {seconds:.0f} s"}]
            answer: _Answer = self._pipe.recv()
        except EOFError:
            self._child.join(KILL_SECONDS)
            code = self._child.exitcode
            self.restart()
            return [{"check": name, "failed": f"its process ended with exit code {code}"}]
        self._is_ready = True
        if not answer.healthy:
            self.restart()
        return answer.rows

    def restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        """End the process, and what it has started."""
        for number, seconds in ((signal.SIGTERM, KILL_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid or 0, number)
            self._child.join(seconds)
        self._pipe.close()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._child = self._context.Process(target=_serve, args=(theirs, *self._given), daemon=True)
        self._child.start()
        theirs.close()
        self._is_ready = False
        while os.getpgid(self._child.pid or 0) != self._child.pid and self._child.is_alive():
            time.sleep(0.01)  # until it leads a group of its own, which end() ends


def _serve(pipe: Connection, sections: Sequence[Section], setup: Setup) -> None:
    """Run the checks that are asked for by number of section and check, until the other end is closed."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what runs say of themselves
    if setup.on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        torch.cuda.set_device(setup.device)
    while True:
        try:
            section, index = pipe.recv()
        except EOFError:
            return
        pipe.send(_measure(sections[section].checks(setup)[index], setup))


def _measure(check: Check, setup: Setup) -> _Answer:
    try:
        rows = list(check.measure())
        gc.collect()  # models in cycles of references
        if setup.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return _Answer(rows, healthy=True)
    except (Exception, SystemExit) as error:
        message = (str(error).strip().splitlines() or [""])[0][:300]
        row: Row = {"check": check.name, "failed": f"{type(error).__name__}: {message}"}
        return _Answer([row], healthy=not setup.on_gpu)
