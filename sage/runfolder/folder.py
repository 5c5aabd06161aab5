"""A run's folder: locked while the run trains; written when it starts, resumes, ends or is stopped.

runs/<config name>/<run id>/: config.yaml, environment.json, metrics.jsonl, checkpoints/, tensorboard/, and
summary.json, written last: a run without it is not done.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sage import files, locks
from sage.console import say
from sage.interfaces import Stopped
from sage.runfolder import checkpoint
from sage.runfolder.manifest import BEST, FINAL, Checkpoint
from sage.runfolder.record import cut_back

REQUEUE = "requeue"
"""A file in the folder of a run that was stopped by a signal other than Ctrl-C: pararun resumes it then."""


LOCK = ".lock"
"""A file in a run's folder that worker 0 keeps locked while it trains."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder where it is missing, and keep every other process from training in it.

    Raises ValueError where another process trains in it, and OSError where it cannot be made.
    """
    opened = locks.lock(folder / LOCK)
    if opened is None:
        check_unlocked(folder)
        raise ValueError(f"{folder}: another process is training this run")
    try:
        yield
    finally:
        os.close(opened)


def check_unlocked(folder: Path) -> None:
    """Raise ValueError where another process trains in a run's folder now."""
    if who := locks.holder(folder / LOCK):
        raise ValueError(f"{folder}: {who} is training this run")


def begin(folder: Path, text: str, environment: dict[str, Any], resumed: Checkpoint | None = None) -> None:
    """Write config.yaml and environment.json into a run's folder. A run that is resumed is first cut back to
    its checkpoint: what it wrote after that is removed.

    text: the resolved configuration. Raises ValueError, and changes nothing, where environment.json or
    metrics.jsonl was not written by this program.
    """
    if resumed is not None:
        environment = _cut_back_to(resumed, folder, environment)
    files.write_text(folder / "config.yaml", text)
    files.write_json(folder / "environment.json", environment)


def _cut_back_to(resumed: Checkpoint, folder: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Remove what a run wrote after a checkpoint; returns the environment with the run's first start and a
    list of when it was resumed."""
    old = _read_environment(folder)
    entry = {"at": environment["started"], "step": resumed.manifest.step, "commit": environment["commit"]}
    environment = environment | {"started": old["started"], "resumed": [*old.get("resumed", []), entry]}

    lost = cut_back(folder / "metrics.jsonl", resumed.manifest.epoch, resumed.manifest.step)
    if lost:
        say(f"{folder / 'metrics.jsonl'}: {lost}: they are missing from what the report says of this run")
    checkpoint.prune_after(resumed)
    (folder / REQUEUE).unlink(missing_ok=True)
    _say_changes(resumed, old, environment)
    return environment


def _read_environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    try:
        old = files.parse_json(files.read_bytes(path))
    except ValueError:
        old = None
    if not isinstance(old, dict) or "started" not in old:
        raise ValueError(f"{path}: expected a JSON object with the key started")
    return old


def _say_changes(resumed: Checkpoint, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Say from where a run is resumed, and what may make its numbers differ from an uninterrupted run's."""
    say(f"resumed after epoch {resumed.manifest.epoch}, step {resumed.manifest.step}")
    before, now = resumed.manifest.world_size, new.get("world_size")
    if before != now:
        say(f"from {before} workers to {now}: each has the mean of their residuals, and new generators")
        return
    for name in ("threads_per_worker", "backend", "simulated", "versions"):
        if old.get(name) != new.get(name):
            say(f"{name} was {old.get(name)}, is {new.get(name)}: numbers may round differently from here on")


def finish(
    folder: Path, summary: dict[str, Any], model: torch.nn.Module, best: dict[str, Any] | None = None
) -> None:
    """Write the final weights, those of the best epoch where they were kept, and then the summary, which says
    that the run is done; then remove its checkpoints. torch.load(path, weights_only=True) reads the
    weights."""
    checkpoint.write_state(folder / "checkpoints" / FINAL, model.state_dict())
    if best is not None:
        checkpoint.write_state(folder / "checkpoints" / BEST, best)
    else:  # a run that ended just here, and was resumed with other settings, has left one
        (folder / "checkpoints" / BEST).unlink(missing_ok=True)
    files.write_json(folder / "summary.json", summary)
    checkpoint.prune(folder, kept=[])


def leave(folder: Path, step: int, stopped: Stopped, saved: Path | None) -> None:
    """Say how to resume a run that was stopped early; if not by Ctrl-C, also write the file REQUEUE.

    saved: its newest checkpoint.
    """
    if not stopped.by_hand and folder.is_dir():
        with suppress(OSError):  # on a full disk it is not resumed by itself
            files.write_text(folder / REQUEUE, "")
    how = (
        f"to resume: --resume {shlex.quote(str(folder))}"
        if saved
        else "there is no checkpoint to resume from"
    )
    say(f"stopped by a signal after step {step}; {how}")


def check_link(job: Path) -> None:
    """Raise ValueError where something other than a link is in the place of a link to a run's folder."""
    if os.path.lexists(job) and not job.is_symlink():
        kind = "folder" if job.is_dir() else "file"
        raise ValueError(f"--job {job}: expected the name of a link, got a {kind}, which would be lost")


def link(job: Path, folder: Path) -> None:
    """Make job a symbolic link to a run's folder; replaces the link that was there.

    Raises ValueError where something else is there, and OSError.
    """
    check_link(job)
    job.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.with_name(f".{job.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.resolve())
    temporary.replace(job)
