"""Train a task with a gradient compressor: configuration > launch > task, reducer > train."""

import sys

from sage import cli

if __name__ == "__main__":
    cli.parse(sys.argv[1:])  # --help and slips are answered before the imports, which take seconds

from functools import partial
from typing import Any

import torch

from reducers import REDUCERS
from sage import checkpoint, config, launch
from sage.experiment import Parts, carry_out
from sage.feedback import FEEDBACKS
from sage.gradient import GradientBuffer
from sage.interfaces import Seeds
from sage.launch import Worker
from sage.metrics import say
from sage.optim import OPTIMIZERS
from sage.train import RunSettings, describe
from tasks import TASKS

COMPONENTS: dict[str, Any] = {"task": TASKS, "reducer": REDUCERS, "feedback": FEEDBACKS}
TABLES = {section: {n: part.Settings for n, part in table.items()} for section, table in COMPONENTS.items()}
TABLES["optimizer"] = OPTIMIZERS
SETTLE = partial(config.load, schema=RunSettings, tables=TABLES)


def main(arguments: list[str]) -> int:
    options = cli.parse(arguments)
    try:
        if options.many:
            return cli.run_sweep(options, SETTLE, partial(find_worker, options), [__file__, *arguments])
        point = cli.choose_point(options)
        settings = SETTLE(point.config, point.overrides)
        if options.print_config:
            return cli.show(config.to_yaml(settings), launch.speaks_here())
        worker = find_worker(options, settings)
        if options.dry_run:
            text = describe(*build(settings, worker), settings.epochs, worker.place)
            return cli.show(text, launch.speaks_here())
        checkpoint.check_writable(options.runs)
    except ValueError as error:
        return cli.complain(str(error)) if launch.speaks_here() else 2
    if worker.place.world_size > 1 and not launch.started_by_launcher():
        return launch.spawn([__file__, *arguments], worker.place.world_size, say)
    again, place = SETTLE if options.sweep else None, options.runs / point.place
    start = partial(carry_out, settings, place, again, build, worker)
    return launch.supervise(worker, settings.timeout_seconds, settings.deterministic, start, cli.complain)


def find_worker(options: cli.Arguments, settings: RunSettings) -> Worker:
    if options.many and launch.started_by_launcher():
        raise ValueError("--sweep: expected an --index too under a launcher, one point a launch")
    if options.many:
        checkpoint.check_writable(options.runs)
    worker = launch.find_worker(options.threads, options.workers, options.data)
    TASKS[settings.task.name].check(settings.task, worker.data, worker.place.world_size)
    return worker


def build(settings: RunSettings, worker: Worker) -> Parts:
    seeds, device = Seeds.derive(settings.seed, worker.place.rank), worker.device
    torch.manual_seed(seeds.common)  # the first weights
    task = TASKS[settings.task.name](settings.task, worker.data, worker.place, seeds=seeds, device=device)
    torch.manual_seed(seeds.worker)  # dropout
    gradient = GradientBuffer(task.model)
    reducer = REDUCERS[settings.reducer.name](settings.reducer, gradient.layout, seeds=seeds, device=device)
    return task, reducer, gradient


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
