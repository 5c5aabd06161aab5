"""One run on one worker: its folder, its parts put together, training, the summary."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sage import config, sweep
from sage.console import say
from sage.exchange.clock import Clock
from sage.interfaces import Stopped, TrainingError
from sage.runfolder import checkpoint, manifest, provenance
from sage.runfolder.checkpoint import CheckpointWriter
from sage.runfolder.folder import begin, claimed, finish, leave, link
from sage.runfolder.manifest import Checkpoint
from sage.runfolder.record import Recorder
from sage.runfolder.resume import ResumePoint, ResumeRequest, choose
from sage.training.settings import RunSettings
from sage.training.simulate import WorkerContext, alone, simulate
from sage.training.train import Parts
from sage.workers import launch
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

Build = Callable[[RunSettings, Worker], Parts]


@dataclass(frozen=True)
class RunPlan:
    """What is to be run."""

    settings: RunSettings
    place: Path
    """Where its folder goes."""
    again: sweep.Resolve | None
    """How to read a run's configuration, to find out whether it is done; None: what is done is done again."""
    found: ResumePoint | None
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
) -> RunPlan:
    """What is to be run. resume: what --resume names; in a sweep (again) a point without a run is begun.

    Raises ValueError, in one line, where that cannot be gone on with; rank 0 reads all its files for that.
    """
    found = None if resume is None else _find(settings, place, resume, worker)
    if resume is not None and found is None and again is None:
        raise ValueError(f"--resume: expected a run with a whole checkpoint in {place}, found none")
    return RunPlan(settings, place, again, found, job)


def _find(settings: RunSettings, place: Path, resume: str, worker: Worker) -> ResumePoint | None:
    reshards = settings.resume.world_size == "reshard"
    asked = ResumeRequest(settings.model_dump(mode="json"), settings.FREE, worker.place.world_size, reshards)
    found = choose(resume, place, asked)
    if found is not None and found.checkpoint is not None and worker.place.rank == 0:
        checkpoint.check_readable(found.checkpoint)
    return found


def start(order: RunPlan, build: Build, worker: Worker) -> int:
    """Carry a run out on this worker, or on all that it simulates; returns the exit code."""
    settings, timeout = order.settings, order.settings.timeout_seconds
    if order.found is not None and order.found.checkpoint is None:
        if worker.place.rank == 0:
            say(f"{order.found.run}: done already")
        return 0
    train = partial(carry_out if order.again is None else run_point, order, build)
    run = partial(simulate if worker.simulated else alone, train, worker, timeout)
    return launch.supervise(worker, timeout, settings.deterministic, run)


def run_point(
    order: RunPlan, build: Build, worker: Worker, store: RendezvousStore, context: WorkerContext
) -> None:
    """Carry out a run of a sweep's point, which no other process runs meanwhile."""
    with sweep.being_run(order.place if worker.place.rank == 0 else None) as trouble:
        _share_trouble("point", trouble, store)
        carry_out(order, build, worker, store, context)


def carry_out(
    order: RunPlan, build: Build, worker: Worker, store: RendezvousStore, context: WorkerContext
) -> None:
    """Train what build makes and leave a run's folder in place, unless such a run is done."""
    settings, device, speaks = order.settings, worker.device, worker.place.rank == 0
    clock, world_size = Clock(device), worker.place.world_size
    comm, side = context.connect(world_size, clock), context.connect(world_size)
    if order.again and _is_done(order.place, settings, order.again, worker, store):
        side.all_reduce(torch.zeros(1, device=device))  # rank 0 may hold the store: no one leaves alone
        return
    parts = build(settings, worker)
    context.share(task := parts[0])
    resumed = _agree(order, store)
    new = order.place / provenance.run_id(settings.reducer.name, settings.seed)
    folder = resumed.run if resumed else Path(store.agree("run", str(new)))
    step, steps = resumed.manifest.step if resumed else 0, settings.epochs * task.steps_per_epoch
    writer = CheckpointWriter(folder, settings.model_dump(mode="json"), settings.checkpoint, store, step)
    waits = not settings.checkpoint.required
    recorder = Recorder(folder if speaks else None, steps, settings.log, step, waits)
    trainer = context.trainer(settings, *parts, comm, side, clock, recorder, store, writer)
    if resumed:  # before anything in the run's folder is changed
        _share_trouble("restored", _trouble(lambda: trainer.restore(resumed)), store)
    workers = store.collect("where", worker.where())
    with claimed(folder if speaks else None) as claim:
        if speaks:
            say(f"{folder}: {worker.describe(workers)}")
        environment = provenance.environment(**worker.facts(), workers=workers) if speaks else {}
        _share_trouble("begun", claim or _trouble(lambda: _open(order, folder, environment, resumed)), store)
        with recorder:
            try:
                summary = trainer.run()
            except Stopped as stopped:
                if speaks:
                    leave(folder, trainer.position.step, stopped, writer.saved())
                raise
            if speaks:
                finish(folder, summary, task.model)


def _is_done(
    place: Path, settings: RunSettings, again: sweep.Resolve, worker: Worker, store: RendezvousStore
) -> bool:
    """What rank 0 finds: another worker's host may not see its files, or see them later."""
    speaks = worker.place.rank == 0
    found = store.agree("done", str((speaks and sweep.finished_run(place, settings, again)) or ""))
    if found and speaks:
        say(f"{found}: done already")
    return bool(found)


def _agree(order: RunPlan, store: RendezvousStore) -> Checkpoint | None:
    """The checkpoint that rank 0 found. Raises TrainingError, on all workers, where one does not see it."""
    mine = order.found.checkpoint if order.found else None
    folder = store.agree("resume", str(mine.folder) if mine else "")
    found, trouble = None, ""
    try:
        found = manifest.read(Path(folder)) if folder else None
    except ValueError as error:
        trouble = str(error)
    _share_trouble("seen", trouble, store)
    return found


def _share_trouble(name: str, trouble: str, store: RendezvousStore) -> None:
    """Raise TrainingError on all workers where one has trouble."""
    for rank, told in enumerate(store.collect(name, trouble)):
        if told:
            raise TrainingError(f"rank {rank}: {told}")


def _trouble(call: Callable[[], object]) -> str:
    """What went wrong in a call, or nothing."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _open(order: RunPlan, folder: Path, environment: dict[str, Any], resumed: Checkpoint | None) -> None:
    """Begin or go on in a run's folder; nothing on a worker that does not speak (without an environment)."""
    if environment:
        begin(folder, config.to_yaml(order.settings), environment, resumed)
        if order.job:
            link(order.job, folder)
