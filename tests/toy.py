"""A small task without BatchNorm or dropout, and a trainer of it, for tests of the loop."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from run import TABLES, build_compression
from sage.config import Named, to_yaml, validate
from sage.exchange.clock import Clock
from sage.exchange.comm import DistComm, LocalComm
from sage.interfaces import Place, Seeds, Stopped, Task
from sage.runfolder.checkpoint import CheckpointWriter
from sage.runfolder.folder import begin
from sage.runfolder.manifest import Checkpoint
from sage.runfolder.record import Recorder
from sage.training.agree import Request
from sage.training.optim import build_optimizer
from sage.training.settings import RunSettings
from sage.training.simulate import SimulatedStore
from sage.training.train import RunServices, Trainer, TrainingParts
from sage.workers.store import RendezvousStore

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

    def loss(self, batch: slice) -> Tensor:
        return F.mse_loss(self.model(self.x[batch]), self.y[batch])

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[float, float]]:
        mine = slice(NUM_TRAIN + self.place.rank, None, self.place.world_size)
        errors = (self.model(self.x[mine]) - self.y[mine]).square().mean(1)
        return {"loss": (errors.sum().item(), float(len(errors)))}


class NormTask(ToyTask):
    """With BatchNorm, whose statistics move with every forward pass, otherwise on each worker."""

    def __init__(self, batch_per_worker: int, place: Place) -> None:
        super().__init__(batch_per_worker, place)
        first, _, last = self.model  # type: ignore[misc]
        self.model = nn.Sequential(first, nn.BatchNorm1d(16), last)


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


def parts_of(settings: RunSettings, task: Task, rank: int) -> TrainingParts:
    """A worker's parts, as run.py builds them."""
    optimizer, seeds = build_optimizer(settings.optimizer, task.model), Seeds.derive(settings.seed, rank)
    return TrainingParts(task, optimizer, partial(build_compression, settings), seeds)


def _store_of(place: Place, comm: LocalComm | DistComm) -> RendezvousStore:
    assert isinstance(comm, LocalComm)
    return SimulatedStore(place, comm)


@contextmanager
def trainer_of(
    settings: RunSettings,
    comm: LocalComm | DistComm,
    batch_per_worker: int = 4,
    folder: Path | None = None,
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
    keeps: bool = False,
    stop_at: int | None = None,
    resumed: Checkpoint | None = None,
    reads_late: bool = False,
    store: RendezvousStore | None = None,
    kind: type[Trainer] = Trainer,
    clock: Clock | None = None,
) -> Iterator[Trainer]:
    """A trainer of the toy for one worker of comm; rank 0 writes metrics.jsonl into folder.

    keeps: write checkpoints there, too; unless one is resumed, folder is made. stop_at: the step from which
    on the last worker requests to stop. resumed: what the trainer goes on from. reads_late: as on a GPU.
    store: of workers that are processes.
    """
    place = Place(comm.rank, comm.world_size)
    task = task or ToyTask(batch_per_worker, place, dtype)
    clock = clock or Clock(next(task.model.parameters()).device)
    comm, side = comm.another(clock), comm.another()
    store, writer = store or _store_of(place, comm), None
    if keeps:
        assert folder is not None
        if comm.rank == 0:
            begin(folder, to_yaml(settings), {"started": "now", "commit": None}, resumed)
        config, step = settings.model_dump(mode="json"), resumed.manifest.step if resumed else 0
        writer = CheckpointWriter(folder, config, settings.checkpoint, store, step)
    steps = settings.epochs * settings.steps_of(task.steps_per_epoch)
    with Recorder(folder if comm.rank == 0 else None, steps, settings.log) as recorder:
        parts = parts_of(settings, task, comm.rank)
        services = RunServices(comm, side, clock, recorder, store, writer, reads_late)
        trainer = kind(settings, parts, services)
        if resumed:
            trainer.restore(resumed)
        if stop_at is not None and comm.rank == comm.world_size - 1:
            trainer.agreement.requested = lambda: (
                Request.STOP if trainer.position.step >= stop_at else Request.NOTHING
            )
        yield trainer


def train(
    settings: RunSettings, comm: LocalComm | DistComm, *given: Any, **named: Any
) -> tuple[Trainer, dict[str, Any]]:
    """Train the toy on one worker of comm; the trainer and its summary. given, named: trainer_of's."""
    with trainer_of(settings, comm, *given, **named) as trainer:
        return trainer, trainer.run()


def train_until(
    stop_at: int, settings: RunSettings, comm: LocalComm | DistComm, folder: Path, **given: Any
) -> None:
    """Train the toy until it is stopped in that step, with a checkpoint."""
    with pytest.raises(Stopped):
        train(settings, comm, folder=folder, keeps=True, stop_at=stop_at, **given)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def lines_of_epochs(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about epochs, whole."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def bits_of(value: Any) -> Any:
    """Something that is equal where a state is the same bit for bit, NaN and the sign of zero included."""
    if isinstance(value, Mapping):
        return {key: bits_of(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits_of(part) for part in value]
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    return repr(value)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The bits of all by which training goes on, but for the meter's."""
    return bits_of(
        {
            "weights": dict(trainer.task.model.named_parameters()),
            "buffers": dict(trainer.task.model.named_buffers()),
            "optimizer": trainer.optimizer.state_dict(),
            **({} if trainer.settings.overlap else {"memory": trainer.exchange.feedback.memory}),
            "exchange": trainer.average.state_dict(),
            "task": trainer.task.state_dict(),
        }
    )
