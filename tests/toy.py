"""A small task without BatchNorm or dropout, and a trainer of it, for tests of the loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reducers import REDUCERS
from run import TABLES
from sage.clock import Clock
from sage.comm import LocalComm
from sage.config import Named, validate
from sage.feedback import FEEDBACKS
from sage.gradient import GradientBuffer
from sage.interfaces import Place, Seeds, Task
from sage.optim import build_optimizer
from sage.record import Recorder
from sage.settings import RunSettings
from sage.simulate import StageBoard
from sage.train import Trainer

NUM_TRAIN, NUM_TEST = 64, 30


class ToyTask(Task):
    """Regression of a fixed random function; every worker takes its slice of the global batch."""

    score = "loss"
    higher_is_better = False

    def __init__(self, batch_per_worker: int, place: Place, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_TRAIN + NUM_TEST, 6, generator=rng, dtype=dtype)
        self.y = torch.randn(NUM_TRAIN + NUM_TEST, 2, generator=rng, dtype=dtype)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=dtype) / 3)
        self.batch_per_worker, self.place = batch_per_worker, place
        self.steps_per_epoch = NUM_TRAIN // (batch_per_worker * place.world_size)

    @classmethod
    def check(cls, config: Any, data: Path, world_size: int) -> None:
        """Nothing to check."""

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[slice]:
        for batch in range(start, self.steps_per_epoch):
            first = (batch * self.place.world_size + self.place.rank) * self.batch_per_worker
            yield slice(first, first + self.batch_per_worker)

    def loss(self, batch: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return F.mse_loss(self.model(self.x[batch]), self.y[batch]), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[float, float]]:
        mine = slice(NUM_TRAIN + self.place.rank, None, self.place.world_size)
        errors = (self.model(self.x[mine]) - self.y[mine]).square().mean(1)
        return {"loss": (errors.sum().item(), float(len(errors)))}


def settings_of(name: str = "exact", /, **changes: Any) -> RunSettings:
    """Settings of a run of two epochs with the named reducer; changes by section."""
    sections: dict[str, Any] = {
        "epochs": 2,
        "task": {"name": "toy"},
        "reducer": {"name": name},
        "feedback": {"name": "residual"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        "log": {"every": 1, "tensorboard": False},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values if isinstance(values, dict) else values
    return validate(sections, RunSettings, {**TABLES, "task": {"toy": Named}})


def train(
    settings: RunSettings,
    comm: LocalComm,
    batch_per_worker: int = 4,
    folder: Path | None = None,
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Trainer, dict[str, Any]]:
    """Train the toy on one worker of comm; rank 0 writes metrics.jsonl into folder."""
    place = Place(comm.rank, comm.world_size)
    task = task or ToyTask(batch_per_worker, place, dtype)
    gradient = GradientBuffer(task.model)
    seeds, device = Seeds.derive(settings.seed, comm.rank), torch.device("cpu")
    reducer = REDUCERS[settings.reducer.name](settings.reducer, gradient.layout, seeds=seeds, device=device)
    feedback = FEEDBACKS[settings.feedback.name](settings.feedback, gradient.flat)
    optimizer = build_optimizer(settings.optimizer, task.model)
    clock = Clock(device)
    comm, side = LocalComm(comm.rank, comm._room, clock), LocalComm(comm.rank, comm._room)
    steps = settings.epochs * task.steps_per_epoch
    with Recorder(folder if comm.rank == 0 else None, steps, settings.log) as recorder:
        parts = (task, reducer, feedback, gradient, optimizer)
        trainer = Trainer(settings, *parts, comm, side, clock, recorder, StageBoard(place, comm))
        return trainer, trainer.run()
