"""Train a task with a gradient compressor: configuration, launch, task, reducer, train. --help explains."""

import sys
from functools import partial
from pathlib import Path

import torch

from reducers import REDUCERS
from sage import checkpoint, cli, config, launch, provenance
from sage.clock import Clock
from sage.comm import connect_comm
from sage.feedback import FEEDBACKS
from sage.gradient import GradientBuffer
from sage.interfaces import Reducer, Seeds, Task
from sage.metrics import Recorder, say
from sage.optim import OPTIMIZERS, build_optimizer
from sage.train import RunSettings, Trainer, describe
from tasks import TASKS

TABLES = {
    "task": {name: task.Settings for name, task in TASKS.items()},
    "reducer": {name: reducer.Settings for name, reducer in REDUCERS.items()},
    "feedback": {name: feedback.Settings for name, feedback in FEEDBACKS.items()},
    "optimizer": OPTIMIZERS,
}


def main(arguments: list[str]) -> int:
    options = cli.parse(arguments)
    try:
        settings = config.load(options.config, options.overrides, RunSettings, TABLES)
        if options.print_config:
            print(config.to_yaml(settings), end="")
            return 0
        worker = launch.find_worker(options.threads, options.workers)
        data = launch.data_folder(options.data)
        TASKS[settings.task.name].check(settings.task, data, worker.place.world_size)
    except ValueError as error:
        return cli.complain(str(error)) if launch.speaks_here() else 2
    if options.dry_run:
        task, gradient, reducer = build(settings, data, worker)
        say("\n".join(describe(task, reducer, gradient, settings.epochs, worker.place.world_size)))
        return 0
    if worker.place.world_size > 1 and not launch.started_by_launcher():
        return launch.spawn([__file__, *arguments], worker.place.world_size, say)
    with launch.connect(worker, settings.timeout_seconds, deterministic=settings.deterministic) as board:
        return launch.supervise(partial(train, settings, options, data, worker, board), board, cli.complain)


def build(settings: RunSettings, data: Path, worker: launch.Worker) -> tuple[Task, GradientBuffer, Reducer]:
    seeds, device = Seeds.derive(settings.seed, worker.place.rank), worker.device
    torch.manual_seed(seeds.common)  # the model's first weights
    task = TASKS[settings.task.name](settings.task, data, worker.place, seeds=seeds, device=device)
    torch.manual_seed(seeds.worker)  # dropout
    gradient = GradientBuffer(task.model)
    reducer = REDUCERS[settings.reducer.name](settings.reducer, gradient.layout, seeds=seeds, device=device)
    return task, gradient, reducer


def train(
    settings: RunSettings, options: cli.Arguments, data: Path, worker: launch.Worker, board: launch.StepBoard
) -> None:
    place, clock = worker.place, Clock(worker.device)
    task, gradient, reducer = build(settings, data, worker)
    feedback = FEEDBACKS[settings.feedback.name](gradient.flat)
    optimizer = build_optimizer(settings.optimizer, task.model)
    where = options.runs / options.config.stem / provenance.run_id(settings.reducer.name, settings.seed)
    folder = Path(board.agree("folder", str(where)))
    hosts = board.collect("host", launch.host_and_device(worker))
    if place.rank == 0:
        say(f"{folder}: {worker.describe()}")
        environment = provenance.environment(
            world_size=place.world_size, backend=worker.backend, workers=hosts
        )
        checkpoint.begin(folder, config.to_yaml(settings), environment)
    comm, side = connect_comm(place.world_size, clock), connect_comm(place.world_size)
    with Recorder(folder if place.rank == 0 else None, settings.epochs * task.steps_per_epoch) as recorder:
        trainer = Trainer(
            settings,
            task,
            reducer,
            feedback,
            gradient,
            optimizer,
            comm=comm,
            side=side,
            clock=clock,
            recorder=recorder,
            board=board,
        )
        summary = trainer.run()
    if place.rank == 0:
        checkpoint.finish(folder, summary, task.model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
