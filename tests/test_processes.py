"""The processes of --workers: what their parent learns of them, and how they end."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sage.workers import processes
from sage.workers.processes import WorkerProcesses

RANK = "import os, pathlib, signal, subprocess, sys, time; rank = int(os.environ['RANK'])\n"
WITH_CHILD = """
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(f"{rank}").write_text(f"{child.pid}\\n")
child.wait()
"""
STUBBORN = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(f"{rank}").write_text("ready\\n")
time.sleep(60)
"""
PATIENCE_SECONDS = 60.0


@pytest.fixture
def workers() -> Iterator[WorkerProcesses]:
    """None yet."""
    workers = WorkerProcesses()
    yield workers
    workers.end()


def start(workers: WorkerProcesses, folder: Path, code: str) -> None:
    """Start two workers that run some code in a folder."""
    command = ["-c", f"{RANK}os.chdir({str(folder)!r})\n{code}"]
    workers.start(command, [os.environ | {"RANK": str(rank)} for rank in range(2)])


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_when_there(path: Path) -> str:
    """The line that a worker writes into a file, once it has."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text().strip()


def is_alive(pid: str) -> bool:
    """A process that has ended and that nobody has asked about is not."""
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_that_end_well_are_all_waited_for(workers: WorkerProcesses, tmp_path: Path) -> None:
    start(workers, tmp_path, "time.sleep(rank); pathlib.Path(f'{rank}').write_text('done')")
    assert workers.wait() is None
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)]
)
def test_the_first_that_fails_is_named_with_its_exit_code(
    workers: WorkerProcesses, tmp_path: Path, end: str, code: int
) -> None:
    start(workers, tmp_path, f"time.sleep(60) if rank == 0 else {end}")
    assert workers.wait() == (1, code)


def test_what_a_worker_has_started_ends_with_it(workers: WorkerProcesses, tmp_path: Path) -> None:
    start(workers, tmp_path, WITH_CHILD)
    children = [read_when_there(tmp_path / str(rank)) for rank in range(2)]
    assert all(map(is_alive, children))
    workers.end()
    assert workers.wait() == (0, -signal.SIGTERM)
    wait_until(lambda: not any(map(is_alive, children)))


def test_a_worker_that_does_not_end_is_killed(
    workers: WorkerProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "END_SECONDS", 0.5)
    start(workers, tmp_path, STUBBORN)
    for rank in range(2):
        read_when_there(tmp_path / str(rank))
    workers.end()
    assert workers.wait() == (0, -signal.SIGKILL)


def test_a_signal_that_comes_while_workers_start_reaches_all_of_them(
    workers: WorkerProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    senders: list[threading.Thread] = []

    class SlowStart(subprocess.Popen):
        """The first sends a signal to the workers while the second has not been started."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            if not started:
                senders.append(threading.Thread(target=workers.send, args=(signal.SIGUSR1,)))
                senders[0].start()
                senders[0].join(0.5)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", SlowStart)
    start(workers, tmp_path, "time.sleep(60)")
    assert [process.wait(PATIENCE_SECONDS) for process in started] == [-signal.SIGUSR1] * 2
