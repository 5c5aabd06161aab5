"""Train a task with a gradient compressor: configuration > launch > task, reducer > train."""

import sys
from functools import partial
from typing import Any

import torch

from reducers import REDUCERS
from sage import checkpoint, cli, config, launch, provenance
from sage.board import Board
from sage.clock import Clock
from sage.feedback import FEEDBACKS
from sage.gradient import GradientBuffer
from sage.interfaces import Seeds
from sage.launch import Worker
from sage.metrics import Recorder, say
from sage.optim import OPTIMIZERS, build_optimizer
from sage.preview import Parts, preview
from sage.simulate import Stage, alone, simulate
from sage.train import RunSettings, check
from tasks import TASKS

COMPONENTS: dict[str, Any] = {"task": TASKS, "reducer": REDUCERS, "feedback": FEEDBACKS}
TABLES = {section: {n: part.Settings for n, part in table.items()} for section, table in COMPONENTS.items()}
TABLES["optimizer"] = OPTIMIZERS


def main(arguments: list[str]) -> int:
    options = cli.parse(arguments)
    try:
        settings = config.load(options.config, options.overrides, RunSettings, TABLES)
        if options.print_config:
            return cli.show(config.to_yaml(settings), launch.speaks_here())
        worker = launch.find_worker(
            options.threads, options.workers, options.data, settings.world_size, options.simulate
        )
        task, reducer = TASKS[settings.task.name], REDUCERS[settings.reducer.name]
        check(settings, task, reducer, worker.data, worker.place.world_size)
        if options.dry_run:
            return cli.show(preview(settings, build(settings, worker), worker), launch.speaks_here())
        checkpoint.check_writable(options.runs)
    except ValueError as error:
        return cli.complain(str(error)) if launch.speaks_here() else launch.give_way()
    if worker.is_to_spawn():
        return launch.spawn([__file__, *arguments], worker.place.world_size, say)
    start, timeout = partial(train, settings, options), settings.timeout_seconds
    start = partial(simulate if worker.simulated else alone, start, worker, timeout)
    return launch.supervise(worker, timeout, settings.deterministic, start, cli.complain)


def build(settings: RunSettings, worker: Worker) -> Parts:
    seeds, device = Seeds.derive(settings.seed, worker.place.rank), worker.device
    torch.manual_seed(seeds.common)  # the first weights
    task = TASKS[settings.task.name](settings.task, worker.data, worker.place, seeds=seeds, device=device)
    torch.manual_seed(seeds.worker)  # dropout
    gradient = GradientBuffer(task.model)
    reducer = REDUCERS[settings.reducer.name](settings.reducer, gradient.layout, seeds=seeds, device=device)
    feedback = FEEDBACKS[settings.feedback.name](settings.feedback, gradient.flat)
    return task, reducer, feedback, gradient, build_optimizer(settings.optimizer, task.model)


def train(settings: RunSettings, options: cli.Arguments, worker: Worker, board: Board, stage: Stage) -> None:
    clock, world_size, speaks = Clock(worker.device), worker.place.world_size, worker.place.rank == 0
    comm, side = stage.connect(world_size, clock), stage.connect(world_size)
    parts = build(settings, worker)
    stage.share(task := parts[0])
    run = board.agree("run", provenance.run_id(settings.reducer.name, settings.seed))
    folder = options.runs / options.config.stem / run
    workers, steps = board.collect("where", worker.where()), settings.epochs * task.steps_per_epoch
    if speaks:
        say(f"{folder}: {worker.describe(workers)}")
        environment = provenance.environment(**worker.facts(), workers=workers)
        checkpoint.begin(folder, config.to_yaml(settings), environment)
    with Recorder(folder if speaks else None, steps, settings.log) as recorder:
        summary = stage.trainer(settings, *parts, comm, side, clock, recorder, board).run()
    if speaks:
        checkpoint.finish(folder, summary, task.model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
