"""One run on one worker: its folder, its parts put together, training, the summary."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sage import config, files, sweep
from sage.console import say
from sage.exchange.clock import Clock
from sage.interfaces import Stopped, TrainingError
from sage.runfolder import checkpoint, manifest, provenance
from sage.runfolder.checkpoint import Keeper
from sage.runfolder.manifest import Asked, Checkpoint, Found
from sage.runfolder.record import Recorder, cut_back
from sage.training.settings import RunSettings
from sage.training.simulate import Stage, alone, simulate
from sage.training.train import Parts
from sage.workers import launch
from sage.workers.store import Board
from sage.workers.worker import Worker

Build = Callable[[RunSettings, Worker], Parts]
REQUEUE = "requeue"
"""The mark in a run's folder that it was ended to be taken up again."""


@dataclass(frozen=True)
class Order:
    """What is to be run."""

    settings: RunSettings
    place: Path
    """Where its folder goes."""
    again: sweep.Resolve | None
    """How to read a run's configuration, to find out whether it is done; None: what is done is done again."""
    found: Found | None
    """What to go on with; None: begin."""
    job: Path | None
    """Where to leave a link to its folder."""


def plan(
    settings: RunSettings,
    place: Path,
    again: sweep.Resolve | None,
    resume: str | None,
    job: Path | None,
    worker: Worker,
) -> Order:
    """What is to be run. resume: what --resume names; in a sweep (again) a point without a run is begun.

    Raises ValueError, in one line, where that cannot be gone on with; rank 0 reads all its files for that.
    """
    found = None if resume is None else _find(settings, place, resume, worker)
    if resume is not None and found is None and again is None:
        raise ValueError(f"--resume: expected a run with a whole checkpoint in {place}, found none")
    return Order(settings, place, again, found, job)


def _find(settings: RunSettings, place: Path, resume: str, worker: Worker) -> Found | None:
    reshards = settings.resume.world_size == "reshard"
    asked = Asked(settings.model_dump(mode="json"), settings.FREE, worker.place.world_size, reshards)
    found = manifest.choose(resume, place, asked)
    if found is not None and found.checkpoint is not None and worker.place.rank == 0:
        checkpoint.check_readable(found.checkpoint)
    return found


def start(order: Order, build: Build, worker: Worker) -> int:
    """Carry a run out on this worker, or on all that it simulates; returns the exit code."""
    settings, timeout = order.settings, order.settings.timeout_seconds
    if order.found is not None and order.found.checkpoint is None:
        if worker.place.rank == 0:
            say(f"{order.found.run}: done already")
        return 0
    train = partial(carry_out, order, build)
    run = partial(simulate if worker.simulated else alone, train, worker, timeout)
    return launch.supervise(worker, timeout, settings.deterministic, run)


def carry_out(order: Order, build: Build, worker: Worker, board: Board, stage: Stage) -> None:
    """Train what build makes and leave a run's folder in place, unless such a run is done."""
    settings, device, speaks = order.settings, worker.device, worker.place.rank == 0
    clock, world_size = Clock(device), worker.place.world_size
    comm, side = stage.connect(world_size, clock), stage.connect(world_size)
    if order.again and _is_done(order.place, settings, order.again, worker, board):
        side.all_reduce(torch.zeros(1, device=device))  # rank 0 may hold the board: no one leaves alone
        return
    parts = build(settings, worker)
    stage.share(task := parts[0])
    resumed = _agree(order, board)
    new = order.place / provenance.run_id(settings.reducer.name, settings.seed)
    folder = resumed.run if resumed else Path(board.agree("run", str(new)))
    step, steps = resumed.manifest.step if resumed else 0, settings.epochs * task.steps_per_epoch
    keeper = Keeper(folder, settings.model_dump(mode="json"), settings.checkpoint, board, step)
    waits = not settings.checkpoint.required
    recorder = Recorder(folder if speaks else None, steps, settings.log, step, waits)
    trainer = stage.trainer(settings, *parts, comm, side, clock, recorder, board, keeper)
    if resumed:  # before anything in the run's folder is changed
        _share_trouble("restored", _trouble(lambda: trainer.restore(resumed)), board)
    workers = board.collect("where", worker.where())
    with claimed(folder if speaks else None) as claim:
        if speaks:
            say(f"{folder}: {worker.describe(workers)}")
        environment = provenance.environment(**worker.facts(), workers=workers) if speaks else {}
        _share_trouble("begun", claim or _trouble(lambda: _open(order, folder, environment, resumed)), board)
        with recorder:
            try:
                summary = trainer.run()
            except Stopped as stopped:
                if speaks:
                    leave(folder, trainer.position.step, stopped, keeper.saved())
                raise
            if speaks:
                finish(folder, summary, task.model)


def _is_done(place: Path, settings: RunSettings, again: sweep.Resolve, worker: Worker, board: Board) -> bool:
    """What rank 0 finds: another worker's host may not see its files, or see them later."""
    speaks = worker.place.rank == 0
    found = board.agree("done", str((speaks and sweep.finished_run(place, settings, again)) or ""))
    if found and speaks:
        say(f"{found}: done already")
    return bool(found)


def _agree(order: Order, board: Board) -> Checkpoint | None:
    """The checkpoint that rank 0 found. Raises TrainingError, on all workers, where one does not see it."""
    mine = order.found.checkpoint if order.found else None
    folder = board.agree("resume", str(mine.folder) if mine else "")
    found, trouble = None, ""
    try:
        found = manifest.read(Path(folder)) if folder else None
    except ValueError as error:
        trouble = str(error)
    _share_trouble("seen", trouble, board)
    return found


def _share_trouble(name: str, trouble: str, board: Board) -> None:
    """Raise TrainingError on all workers where one has trouble."""
    for rank, told in enumerate(board.collect(name, trouble)):
        if told:
            raise TrainingError(f"rank {rank}: {told}")


def _trouble(call: Callable[[], object]) -> str:
    """What went wrong in a call, or nothing."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _open(order: Order, folder: Path, environment: dict[str, Any], resumed: Checkpoint | None) -> None:
    """Begin or go on in a run's folder; nothing on a worker that does not speak (without an environment)."""
    if environment:
        begin(folder, config.to_yaml(order.settings), environment, resumed)
        if order.job:
            _link(order.job, folder)


# --- a run's folder -------------------------------------------------------------------------------


@contextmanager
def claimed(folder: Path | None) -> Iterator[str]:
    """Make a run's folder, or hold the one that is there, against a second process that would go on with it;
    yields what keeps one from it. Where the file system knows no locks nothing is held."""
    if folder is None:
        yield ""
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        yield str(error)
        return
    trouble = ""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        trouble = f"{folder}: expected a run that no process trains, got one that does"
    except OSError:
        pass
    try:
        yield trouble
    finally:
        os.close(opened)


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


def _link(job: Path, folder: Path) -> None:
    """Point a link to a run's folder; what was there is replaced."""
    job.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.with_name(f".{job.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.resolve())
    temporary.replace(job)
