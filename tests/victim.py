"""The runs of the fault campaign: their processes, what they write, and a disk that can be filled."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

import torch

from tests.forks import workers_of

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH = 3, 4
STEPS = EPOCHS * (1437 // (2 * BATCH))
RUN = [
    *("configs/digits.yaml", f"epochs={EPOCHS}", f"task.batch_per_worker={BATCH}", "timeout_seconds=60"),
    *("checkpoint.every_minutes=0.01", "log.every=1", "log.tensorboard=false", "--workers", "2"),
    *("--threads", "1"),
]
DISK = "16m"
"""Enough for three checkpoints of 2.4 MB and the lines."""
FULL = os.strerror(errno.ENOSPC)
PATIENCE_SECONDS = 240.0
FINAL = "checkpoints/final.pt"
RESUMED = re.compile(r"resumed after epoch \d+, step (\d+)")


# --- what a run has written -------------------------------------------------------------------------


def saved_steps(run: Path) -> int:
    """Steps done at the newest checkpoint whose files all have the manifest's checksums; 0: there is none."""
    for folder in sorted(run.glob("checkpoints/step-*"), reverse=True):
        with suppress(OSError, ValueError):
            manifest = json.loads((folder / "manifest.json").read_bytes())
            expected = {name: facts["sha256"] for name, facts in manifest["files"].items()}
            sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in expected}
            if expected == sums and set(sums) == {"shared.pt", "rank0.pt", "rank1.pt"}:
                return int(manifest["step"])
    return 0


def has_incomplete_checkpoint(run: Path) -> bool:
    """Whether a checkpoint has no manifest yet."""
    return any(not (folder / "manifest.json").exists() for folder in run.glob("checkpoints/step-*"))


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, without their seconds."""
    path = run / "metrics.jsonl"
    *texts, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [{k: v for k, v in json.loads(text).items() if k != "seconds"} for text in texts]


def steps_of(run: Path) -> list[int]:
    """The steps that have a complete line."""
    return [line["step"] for line in lines_of(run) if line["kind"] == "step"]


def count_steps(run: Path) -> int:
    """How many steps have a complete line; cheap, since it is called again and again while the run trains."""
    path = run / "metrics.jsonl"
    texts = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return texts.count(b'{"kind": "step"')


def differing_bits(one: Path, other: Path) -> int:
    """How many bits differ between two files of weights."""
    mine, theirs = (torch.load(path, weights_only=True) for path in (one, other))
    pairs = [(value.reshape(-1).view(torch.uint8), theirs[name]) for name, value in mine.items()]
    changed = [a ^ b.reshape(-1).view(torch.uint8) for a, b in pairs]
    return sum(int(x.bitwise_and(1 << bit).count_nonzero()) for x in changed for bit in range(8))


def difference(run: Path, reference: Path) -> str:
    """What differs between two runs that are done, but for their seconds; empty: nothing."""
    same = _read(run, FINAL) == _read(reference, FINAL)
    found = [] if same else [f"{FINAL}: {differing_bits(run / FINAL, reference / FINAL)} bits differ"]
    mine, theirs = lines_of(run), lines_of(reference)
    differ = [n for n, pair in enumerate(zip(mine, theirs, strict=False), 1) if pair[0] != pair[1]]
    if differ or len(mine) != len(theirs):
        found.append(f"metrics.jsonl: {len(mine)} lines for {len(theirs)}, other lines: {differ[:3]}")
    sums = [json.loads(_read(folder, "summary.json")) for folder in (run, reference)]
    for summary in sums:
        del summary["totals"]["seconds"]
    if sums[0] != sums[1]:
        found.append("summary.json differs")
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (run, reference)
    ]
    if names[0] != names[1]:
        found.append(f"files: {names[0]} for {names[1]}")
    return "; ".join(found)


def _read(run: Path, name: str) -> bytes:
    return (run / name).read_bytes()


# --- processes ------------------------------------------------------------------------------------


class TooLateError(Exception):
    """The run ended before its fault could happen."""


class Victim:
    """A run's processes, one launch after the other."""

    def __init__(self, runs: Path, outputs: Path) -> None:
        """outputs: the folder for what the processes print."""
        self.runs, self._outputs = runs, outputs
        self.launcher: subprocess.Popen[bytes] | None = None
        self._output = Path()
        self._workers: dict[int, int] = {}
        self._num_starts = 0

    @property
    def folder(self) -> Path:
        """The folder of the run that was started last."""
        return max(self.runs.glob("digits/*/"), default=self.runs / "none")

    def start(self, *arguments: str) -> None:
        self._num_starts += 1
        self._output = self._outputs / f"{self._num_starts}.txt"
        command = [sys.executable, "run.py", *RUN, "--runs", str(self.runs), *arguments]
        with self._output.open("wb") as output:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._workers = {}

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        assert self.launcher is not None
        return self.launcher.pid

    def has_ended(self) -> bool:
        return self.launcher is None or self.launcher.poll() is not None

    def said(self) -> str:
        """What the processes of the last launch have printed."""
        return self._output.read_text()

    def workers(self) -> dict[int, int]:
        """Process ids by rank; includes workers that were found by an earlier call and have ended since."""
        self._workers |= workers_of(self.pid)
        return self._workers

    def send(self, number: Signals, *whom: int) -> None:
        for pid in whom:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        """Kill all processes at once, as when their host is lost."""
        self.send(SIGKILL, *self.workers().values(), self.pid)

    def wait_for(self, holds: Callable[[], bool], what: str, pause_seconds: float = 0.02) -> bool:
        """Wait until a condition holds or the launcher has ended; returns whether it holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            if self.has_ended():
                return holds()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {PATIENCE_SECONDS:g} s; {self.said()[-500:]}")
            time.sleep(pause_seconds)
        return True

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many steps have a line. Raises TooLateError where the run ends before."""
        if not self.wait_for(lambda: count_steps(self.folder) >= count, f"step {count}"):
            raise TooLateError(f"step {count}")

    def end(self) -> int:
        """Wait until the launcher and its workers have ended; returns the launcher's exit code."""
        assert self.launcher is not None
        code = self.launcher.wait(PATIENCE_SECONDS)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while alive := [pid for pid in self._workers.values() if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"workers {alive} are still running after their launcher ended")
            time.sleep(0.05)
        self._workers = {}  # the system may give their ids to other processes
        return code

    def close(self) -> None:
        """Kill what is still running."""
        if self.launcher is not None:
            if self.has_ended():
                self.send(SIGKILL, *self._workers.values())
            else:
                self.kill_all()
            self.end()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small file system at a folder. Raises OSError, with the reason, where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or "mount failed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def why_no_disk(folder: Path) -> str:
    """Why no small file system can be mounted; empty where one can."""
    try:
        with small_disk(folder):
            return ""
    except OSError as error:
        return str(error)
