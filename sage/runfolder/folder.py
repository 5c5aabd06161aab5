"""A run's folder: locked while it trains, begun or gone on with, finished or left.

runs/<config name>/<run id>/: config.yaml, environment.json, metrics.jsonl, checkpoints/, tensorboard/, and
summary.json, written last: a run without it is not done.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sage import files
from sage.console import say
from sage.interfaces import Stopped
from sage.runfolder import checkpoint
from sage.runfolder.manifest import Checkpoint
from sage.runfolder.record import cut_back

REQUEUE = "requeue"
"""The mark in a run's folder that it was ended to be taken up again."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder where it is missing, and keep every other process from training in it.

    Raises ValueError where another process trains in it, and OSError where it cannot be made or opened. A
    file system without locks is not an error: nothing is locked then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        _lock_or_raise(opened, folder)
        yield
    finally:
        os.close(opened)


def _lock_or_raise(opened: int, folder: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is training this run") from None
    except OSError:  # the file system has no locks
        pass


def begin(folder: Path, text: str, environment: dict[str, Any], resumed: Checkpoint | None = None) -> None:
    """Write into a run's folder its resolved configuration and where it runs; or cut what is in it back to a
    checkpoint. Raises ValueError, and changes nothing, where a file of it is none of ours."""
    if resumed is not None:
        again = {"at": environment["started"], "step": resumed.manifest.step, "commit": environment["commit"]}
        old = _read_environment(folder)
        environment |= {"started": old["started"], "resumed": [*old.get("resumed", []), again]}
        cut_back(folder / "metrics.jsonl", resumed.manifest.epoch, resumed.manifest.step)
        checkpoint.prune_after(resumed)
        (folder / REQUEUE).unlink(missing_ok=True)
        _say_changes(resumed, old, environment)
    files.write_text(folder / "config.yaml", text)
    files.write_json(folder / "environment.json", environment)


def _read_environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    try:
        old = json.loads(path.read_bytes())
    except ValueError:
        old = None
    if not isinstance(old, dict) or "started" not in old:
        raise ValueError(f"{path}: expected a JSON object with started")
    return old


def _say_changes(resumed: Checkpoint, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Where a run goes on, and what may keep its bits from being those of a run that was not stopped."""
    say(f"goes on after epoch {resumed.manifest.epoch}, step {resumed.manifest.step}")
    before, now = resumed.manifest.world_size, new.get("world_size")
    if before != now:
        say(f"from {before} workers to {now}: each has the mean of their residuals, and new generators")
    for name in ("threads_per_worker", "backend", "simulated", "versions"):
        if before == now and old.get(name) != new.get(name):
            say(f"{name} was {old.get(name)}, is {new.get(name)}: numbers may round otherwise from here on")


def finish(folder: Path, summary: dict[str, Any], model: torch.nn.Module) -> None:
    """Write the final weights, then the summary, whose presence says that the run is done; then its
    checkpoints are of no more use."""
    checkpoint.write_weights(folder / "checkpoints" / "final.pt", model)
    files.write_json(folder / "summary.json", summary)
    checkpoint.prune(folder, kept=[])


def leave(folder: Path, step: int, stopped: Stopped, saved: Path | None) -> None:
    """Say how to go on with a run that was ended early, and mark it where that is not the user's to do.
    saved: its newest checkpoint."""
    if not stopped.by_hand:
        with suppress(OSError):  # on a full disk nobody takes it up again
            files.write_text(folder / REQUEUE, "")
    told = f"to go on: --resume {folder}" if saved else "there is no checkpoint to go on from"
    say(f"stopped by a signal after step {step}; {told}")


def link(job: Path, folder: Path) -> None:
    """Point a link to a run's folder; what was there is replaced."""
    job.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.with_name(f".{job.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.resolve())
    temporary.replace(job)
