"""Train a task with a gradient compressor: configuration > launch > task, reducer > train."""

import sys

from sage import cli
from sage.workers import environment
from sage.workers.signals import WATCH

if __name__ == "__main__":
    WATCH.listen()
    cli.parse(sys.argv[1:])  # --help and slips are answered before the imports, which take seconds
    environment.set_defaults()

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from sage import config, files
from sage.components import SettingsTable
from sage.console import complain, fold_items, show, terminal_width
from sage.exchange.feedback import FEEDBACKS
from sage.exchange.scaling import SCALINGS
from sage.interfaces import Seeds, Slot, Task
from sage.reference import COLUMNS, to_commented_yaml
from sage.runfolder.folder import check_link
from sage.runfolder.record import check_wandb
from sage.training.dry_run import NAME_WIDTH, describe_run
from sage.training.experiment import RunPlan, find_resume_point, start
from sage.training.optim import OPTIMIZERS, build_optimizer
from sage.training.score import read_saved, score
from sage.training.settings import RunSettings, check
from sage.training.train import Compression, TrainingParts
from sage.workers import launch
from sage.workers.worker import Worker
from tasks import TASKS

COMPONENTS: dict[str, Any] = {
    "task": TASKS,
    "reducer": REDUCERS,
    "scaling": SCALINGS,
    "feedback": FEEDBACKS,
}
TABLES: config.Tables = {
    **{section: SettingsTable(table) for section, table in COMPONENTS.items()},
    "optimizer": OPTIMIZERS,
}
LOAD_SETTINGS = partial(config.load, schema=RunSettings, tables=TABLES)


def main(arguments: list[str]) -> int:
    options = cli.parse(arguments)
    try:
        if options.runs_whole_sweep:
            return cli.run_sweep(
                options, LOAD_SETTINGS, partial(find_worker, options), [__file__, *arguments]
            )
        point = cli.choose_point(options)
        settings = LOAD_SETTINGS(point.config, point.overrides)
        if options.print_config:
            width = min(COLUMNS, terminal_width(otherwise=COLUMNS))
            return show(to_commented_yaml(settings, width), launch.is_first_on_host())
        worker = find_worker(options, settings)
        if options.dry_run:
            text = describe_run(settings, build(settings, worker), worker)
            width = terminal_width(otherwise=len(text))  # of a file: each item is a line
            return show(fold_items(text, width, NAME_WIDTH), launch.is_first_on_host())
        run = prepare(options, settings, options.runs / point.folder, worker)
    except ValueError as error:
        return complain(str(error)) if launch.is_first_on_host() else launch.wait_before_exit()
    if worker.is_to_spawn():
        return launch.spawn([__file__, *arguments], worker.place.world_size)
    return run()


def find_worker(options: cli.Arguments, settings: RunSettings) -> Worker:
    """This process's worker, on which the settings can run. Raises ValueError."""
    if options.evaluate:  # by as many workers as the command line says
        settings = settings.model_copy(update={"world_size": None, "compile": False})
    requested = (options.workers, settings.world_size, options.simulate)
    worker = launch.find_worker(options.threads, options.data, *requested)
    if options.runs_whole_sweep and worker.rendezvous.launched:
        raise ValueError("--sweep: expected an --index too under a launcher, one point a launch")
    check(settings, TASKS, REDUCERS, worker.data, worker.place.world_size, worker.simulated)
    return worker


def prepare(options: cli.Arguments, settings: RunSettings, parent: Path, worker: Worker) -> Callable[[], int]:
    """Check all that can be checked before a worker starts; returns what this worker is to do. parent: where
    the run's folder is, or will be. Raises ValueError."""
    speaks = worker.place.rank == 0
    if options.evaluate:
        if speaks:
            read_saved(options.evaluate)
        return partial(score, options.evaluate, settings, build_task, worker)
    files.check_writable(options.runs)
    if options.job:
        check_link(options.job)
    if speaks:
        check_wandb(settings.log)
    return partial(start, plan_run(options, settings, parent, worker), build, worker)


def plan_run(options: cli.Arguments, settings: RunSettings, parent: Path, worker: Worker) -> RunPlan:
    """What is to be run; a point of a sweep that --resume finds no run of is begun. Raises ValueError."""
    resume_point = None
    if options.resume is not None:
        resume_point = find_resume_point(settings, parent, options.resume, worker, required=not options.sweep)
    return RunPlan(settings, parent, LOAD_SETTINGS if options.sweep else None, resume_point, options.job)


def build_task(settings: RunSettings, worker: Worker) -> Task:
    """The task that a worker trains, with its first weights."""
    seeds = Seeds.derive(settings.seed, worker.place.rank)
    torch.manual_seed(seeds.common)  # the first weights
    kind = TASKS[settings.task.name]
    return kind(settings.task, worker.data, worker.place, seeds=seeds, device=worker.device)


def build(settings: RunSettings, worker: Worker) -> TrainingParts:
    """What a worker trains."""
    seeds = Seeds.derive(settings.seed, worker.place.rank)
    task = build_task(settings, worker)
    torch.manual_seed(seeds.worker)  # dropout
    return TrainingParts(
        task=task,
        optimizer=build_optimizer(settings.optimizer, task.model),
        compress=partial(build_compression, settings),
        seeds=seeds,
    )


def build_compression(settings: RunSettings, layout: list[Slot], like: Tensor, seeds: Seeds) -> Compression:
    """A reducer, its feedback and scaling of a layout, and of a tensor (n,) like its flat gradient."""
    reducer = reducers.build(settings.reducer, layout, seeds=seeds, device=like.device)
    return Compression(
        reducer,
        feedback=FEEDBACKS[settings.feedback.name](settings.feedback, like),
        scaling=reducers.build_scaling(settings.scaling, reducer, layout, like.device),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
