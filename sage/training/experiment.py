"""One run on one worker: what is to be run, its parts put together, training, and what it leaves on disk."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sage import config, sweep
from sage.console import say
from sage.exchange.clock import Clock
from sage.files import RunFolderLost
from sage.interfaces import Stopped, TrainingError
from sage.runfolder import checkpoint, manifest, provenance
from sage.runfolder.checkpoint import CheckpointWriter
from sage.runfolder.folder import begin, check_unlocked, finish, leave, link, lock
from sage.runfolder.manifest import Checkpoint
from sage.runfolder.record import Recorder
from sage.runfolder.resume import ResumePoint, ResumeRequest, choose
from sage.training.agree import on_all_workers, raise_on_all_workers, wait_for_all
from sage.training.compiled import check_compiles
from sage.training.overlap import OverlappedTrainer
from sage.training.precision import set_up_arithmetic
from sage.training.settings import RunSettings, notes
from sage.training.simulate import WorkerContext, run_single, simulate
from sage.training.train import RunServices, Trainer, TrainingParts
from sage.workers import launch
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

Build = Callable[[RunSettings, Worker], TrainingParts]


@dataclass(frozen=True)
class RunPlan:
    """What is to be run."""

    settings: RunSettings
    parent: Path
    """Where the run's folder is made."""
    load_settings: sweep.LoadSettings | None = None
    """How to read the configuration of a finished run: a point of a sweep that is done is skipped. None: what
    is done is run again."""
    resume_point: ResumePoint | None = None
    """The run to resume; None: a new one."""
    job_link: Path | None = None
    """Where to leave a link to the run's folder."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self.resume_point.checkpoint if self.resume_point else None

    @property
    def finished_run(self) -> Path | None:
        """The run that --resume names, where nothing of it is left to do."""
        return self.resume_point.run if self.resume_point and not self.resume_point.checkpoint else None


def find_resume_point(
    settings: RunSettings, parent: Path, path: str, worker: Worker, *, required: bool
) -> ResumePoint | None:
    """The run and the checkpoint that --resume PATH names. required: without one there is an error, not a new
    run.

    Raises ValueError, in one line, where it cannot be resumed; for that, rank 0 reads all files of it.
    """
    may_reshard = settings.resume.world_size == "reshard"
    request = ResumeRequest(
        settings.model_dump(mode="json"), settings.FREE, worker.place.world_size, may_reshard
    )
    found = choose(path, parent, request)
    if found is None and required:
        raise ValueError(f"--resume: expected a run with a whole checkpoint in {parent}, found none")
    if found is not None and found.checkpoint is not None and worker.place.rank == 0:
        check_unlocked(found.run)
        _check_has_best(settings, found.checkpoint)
        try:
            checkpoint.check_readable(found.checkpoint)
        except ValueError as error:
            older = manifest.older_whole(found.checkpoint.folder / manifest.NAME)
            raise ValueError(f"--resume: the checkpoint is damaged: {error}; {older}") from None
    return found


def _check_has_best(settings: RunSettings, found: Checkpoint) -> None:
    """Raise ValueError where the best epoch's weights are to be kept, but those of a run so far are lost."""
    if settings.checkpoint.best and found.manifest.epoch > 0 and manifest.BEST not in found.manifest.files:
        problem = f"expected false, since {found.folder} has no weights of its best epoch so far"
        raise ValueError(f"checkpoint.best: {problem}: that run did not keep them")


def start(plan: RunPlan, build: Build, worker: Worker) -> int:
    """Run on this worker, or on all that this process simulates; returns the exit code."""
    settings, speaks = plan.settings, worker.place.rank == 0
    if plan.finished_run is not None:
        if speaks:
            say(f"{plan.finished_run}: done already")
        return 0
    set_up_arithmetic(settings.deterministic)
    train = partial(run_worker if plan.load_settings is None else run_point, plan, build)
    run = partial(simulate if worker.simulated else run_single, train, worker, settings.timeout_seconds)
    return launch.supervise(worker, settings.timeout_seconds, settings.deterministic, run)


def run_point(
    plan: RunPlan, build: Build, worker: Worker, store: RendezvousStore, context: WorkerContext
) -> None:
    """Run a sweep's point, on one worker, while no other process runs it."""
    with sweep.being_run(plan.parent if worker.place.rank == 0 else None) as error:
        raise_on_all_workers("point", error, store)
        run_worker(plan, build, worker, store, context)


def run_worker(
    plan: RunPlan, build: Build, worker: Worker, store: RendezvousStore, context: WorkerContext
) -> None:
    """Train what build makes, on one worker, and leave a run's folder; unless such a run is done."""
    settings, world_size, speaks = plan.settings, worker.place.world_size, worker.place.rank == 0
    clock = Clock(worker.device, context.deadline)
    comm, side = context.connect(world_size, clock), context.connect(world_size)
    if _is_done(plan, worker, store):
        wait_for_all(side, worker.device)  # rank 0 may host the store: no worker exits before it is done
        return

    # 1. what is trained
    parts = build(settings, worker)
    context.share(parts.task)
    if settings.compile:
        on_all_workers("compiled", lambda: check_compiles(worker.device), store)

    # 2. where, and from which step on
    resumed = _agree_on_checkpoint(plan, store)
    folder = resumed.run if resumed else _agree_on_folder(plan, store)
    first_step = resumed.manifest.step if resumed else 0

    # 3. the trainer; of a resumed run everything is loaded before anything in its folder is changed
    dump = settings.model_dump(mode="json")
    writer = CheckpointWriter(folder, dump, settings.checkpoint, store, first_step)
    recorder = Recorder(
        folder if speaks else None,
        settings.epochs * settings.steps_of(parts.task.steps_per_epoch),
        settings.log,
        first_step,
        keep_waiting=not settings.checkpoint.required,
    )
    reads_late = worker.device.type == "cuda"
    services = RunServices(comm, side, clock, recorder, store, writer, reads_late)
    kind = context.trainer if settings.overlap is None else OverlappedTrainer
    trainer = kind(settings, parts, services)
    if resumed:
        on_all_workers("restored", lambda: trainer.restore(resumed), store)

    # 4. training
    _train_in(folder, trainer, plan, worker, store)


def _train_in(folder: Path, trainer: Trainer, plan: RunPlan, worker: Worker, store: RendezvousStore) -> None:
    """Train in a run's folder, which rank 0 locks, begins or cuts back to a checkpoint, and finishes."""
    speaks = worker.place.rank == 0
    workers = store.collect("where", worker.where())
    with ExitStack() as held:

        def open_folder() -> None:
            if not speaks:
                return
            say(f"{folder}: {worker.describe(workers)}")
            for note in (*notes(plan.settings, worker.device), *trainer.notes()):
                say(note)
            held.enter_context(lock(folder))
            environment = provenance.environment(**worker.facts(), workers=workers)
            begin(folder, config.to_yaml(plan.settings), environment, plan.checkpoint)
            if plan.job_link:
                link(plan.job_link, folder)
            held.enter_context(trainer.recorder)

        on_all_workers("opened", open_folder, store)
        _train(trainer, folder, speaks)


def _train(trainer: Trainer, folder: Path, speaks: bool) -> None:
    """Train to the end, or until a signal stops the run; the worker that speaks leaves the folder in
    order."""
    try:
        summary = trainer.run()
    except Stopped as stopped:
        if speaks:
            leave(folder, trainer.position.step, stopped, trainer.writer.saved() if trainer.writer else None)
        raise
    if speaks:
        try:
            trainer.recorder.sync()
        except RunFolderLost as error:  # nothing of it is made anew
            raise TrainingError(str(error)) from None
        finish(folder, summary, trainer.task.model, trainer.best_weights)


def _is_done(plan: RunPlan, worker: Worker, store: RendezvousStore) -> bool:
    """Whether rank 0 finds a finished run of the settings. The others' hosts may see its files later, or
    not."""
    if plan.load_settings is None:
        return False
    speaks = worker.place.rank == 0
    found = sweep.finished_run(plan.parent, plan.settings, plan.load_settings) if speaks else None
    name = store.agree("done", str(found) if found else "")
    if name and speaks:
        say(f"{name}: done already")
    return bool(name)


def _agree_on_folder(plan: RunPlan, store: RendezvousStore) -> Path:
    """The new run's folder, which rank 0 names. Raises TrainingError, on all workers, where one gets what is
    no name of a folder."""
    name = store.agree("run", provenance.run_id(plan.settings.reducer.name, plan.settings.seed))

    def check_name() -> None:
        if not provenance.is_run_id(name):
            raise ValueError(f"the rendezvous store: expected the name of a run's folder, got {name[:60]!r}")

    on_all_workers("named", check_name, store)
    return plan.parent / name


def _check_within(folder: Path, plan: RunPlan) -> None:
    """Raise ValueError where a checkpoint's folder is not of the run that --resume names, nor of one beside
    it."""
    run = folder.parent.parent.resolve()
    own = plan.checkpoint.run.resolve() if plan.checkpoint else None
    if run != own and run.parent != plan.parent.resolve():
        raise ValueError(
            f"the rendezvous store: expected a checkpoint in {plan.parent}, got {str(folder)[:200]!r}"
        )


def _agree_on_checkpoint(plan: RunPlan, store: RendezvousStore) -> Checkpoint | None:
    """The checkpoint that rank 0 found. Raises TrainingError, on all workers, where one does not see it."""
    folder = store.agree("resume", str(plan.checkpoint.folder) if plan.checkpoint else "")
    seen: list[Checkpoint] = []

    def see() -> None:
        if plan.checkpoint and folder == str(plan.checkpoint.folder):
            seen.append(plan.checkpoint)  # it knows which of its files it has verified
        elif folder:
            _check_within(Path(folder), plan)
            seen.append(manifest.read(Path(folder)))

    on_all_workers("seen", see, store)
    return seen[0] if seen else None
