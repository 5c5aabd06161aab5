"""One run on one worker: its folder, its parts put together, training, the summary."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sage import checkpoint, config, launch, provenance, sweep
from sage.board import Board
from sage.clock import Clock
from sage.metrics import Recorder, say
from sage.simulate import Stage, alone, simulate
from sage.train import Parts, RunSettings
from sage.worker import Worker

Build = Callable[[RunSettings, Worker], Parts]


def start(
    settings: RunSettings,
    place: Path,
    again: sweep.Resolve | None,
    build: Build,
    worker: Worker,
    complain: Callable[[str], object],
) -> int:
    """Carry a run out on this worker, or on all that it simulates; returns the exit code."""
    train, timeout = partial(carry_out, settings, place, again, build), settings.timeout_seconds
    run = partial(simulate if worker.simulated else alone, train, worker, timeout)
    return launch.supervise(worker, timeout, settings.deterministic, run, complain)


def carry_out(
    settings: RunSettings,
    place: Path,
    again: sweep.Resolve | None,
    build: Build,
    worker: Worker,
    board: Board,
    stage: Stage,
) -> None:
    """Train what build makes and leave a run's folder in place, unless such a run is done.

    again: how to read a run's configuration; None: what is done is done again.
    """
    clock, world_size, speaks = Clock(worker.device), worker.place.world_size, worker.place.rank == 0
    comm, side = stage.connect(world_size, clock), stage.connect(world_size)
    if again and _is_done(place, settings, again, worker, board):
        side.all_reduce(
            torch.zeros(1, device=worker.device)
        )  # rank 0 may hold the board: no one leaves alone
        return
    parts = build(settings, worker)
    stage.share(task := parts[0])
    folder = place / board.agree("run", provenance.run_id(settings.reducer.name, settings.seed))
    workers, steps = board.collect("where", worker.where()), settings.epochs * task.steps_per_epoch
    if speaks:
        say(f"{folder}: {worker.describe(workers)}")
        environment = provenance.environment(**worker.facts(), workers=workers)
        checkpoint.begin(folder, config.to_yaml(settings), environment)
    with Recorder(folder if speaks else None, steps, settings.log) as recorder:
        summary = stage.trainer(settings, *parts, comm, side, clock, recorder, board).run()
    if speaks:
        checkpoint.finish(folder, summary, task.model)


def _is_done(place: Path, settings: RunSettings, again: sweep.Resolve, worker: Worker, board: Board) -> bool:
    """What rank 0 finds: another worker's host may not see its files, or see them later."""
    speaks = worker.place.rank == 0
    found = board.agree("done", str((speaks and sweep.finished_run(place, settings, again)) or ""))
    if found and speaks:
        say(f"{found}: done already")
    return bool(found)
