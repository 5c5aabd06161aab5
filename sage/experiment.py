"""One run on one worker: its folder, its parts put together, training, the summary."""

from collections.abc import Callable
from pathlib import Path

import torch

from sage import checkpoint, config, provenance, sweep
from sage.board import Board
from sage.clock import Clock
from sage.comm import connect_comm
from sage.feedback import FEEDBACKS
from sage.gradient import GradientBuffer
from sage.interfaces import Reducer, Task
from sage.launch import Worker
from sage.metrics import Recorder, say
from sage.optim import build_optimizer
from sage.train import RunSettings, Trainer

Parts = tuple[Task, Reducer, GradientBuffer]
Build = Callable[[RunSettings, Worker], Parts]


def carry_out(
    settings: RunSettings,
    place: Path,
    again: sweep.Resolve | None,
    build: Build,
    worker: Worker,
    board: Board,
) -> None:
    """Train what build makes and leave a run's folder in place, unless such a run is done.

    again: how to read a run's configuration; None: what is done is done again.
    """
    clock, world_size, speaks = Clock(worker.device), worker.place.world_size, worker.place.rank == 0
    comm, side = connect_comm(world_size, clock), connect_comm(world_size)
    if again and _is_done(place, settings, again, worker, board):
        side.all_reduce(
            torch.zeros(1, device=worker.device)
        )  # rank 0 may hold the board: no one leaves alone
        return
    task, reducer, gradient = build(settings, worker)
    feedback = FEEDBACKS[settings.feedback.name](gradient.flat)
    optimizer = build_optimizer(settings.optimizer, task.model)
    folder = place / board.agree("run", provenance.run_id(settings.reducer.name, settings.seed))
    workers, steps = board.collect("where", worker.where()), settings.epochs * task.steps_per_epoch
    if speaks:
        say(f"{folder}: {worker.describe()}")
        environment = provenance.environment(**worker.facts(), workers=workers)
        checkpoint.begin(folder, config.to_yaml(settings), environment)
    with Recorder(folder if speaks else None, steps, settings.log) as recorder:
        parts = (task, reducer, feedback, gradient, optimizer)
        summary = Trainer(settings, *parts, comm, side, clock, recorder, board).run()
    if speaks:
        checkpoint.finish(folder, summary, task.model)


def _is_done(place: Path, settings: RunSettings, again: sweep.Resolve, worker: Worker, board: Board) -> bool:
    """What rank 0 finds: another worker's host may not see its files, or see them later."""
    speaks = worker.place.rank == 0
    found = board.agree("done", str((speaks and sweep.finished_run(place, settings, again)) or ""))
    if found and speaks:
        say(f"{found}: done already")
    return bool(found)
