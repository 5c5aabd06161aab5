"""A whole experiment's settings, and whether its parts go together."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny

from sage.config import Named, Settings
from sage.exchange.feedback import FEEDBACKS
from sage.interfaces import Reducer, Task
from sage.runfolder.checkpoint import Checkpoints
from sage.runfolder.record import Log
from sage.training.optim import Clip, Schedule
from sage.training.precision import Precision, precision_notes


class Resume(Settings):
    """What --resume does."""

    world_size: Literal["refuse", "reshard"] = "refuse"
    """For a checkpoint of another number of workers: refuse it; reshard: every worker gets the mean of the
    old residuals, which conserves their mean, and new generators."""


class RunSettings(Settings):
    """A whole experiment: what `python run.py CONFIG --print-config` prints."""

    seed: int = Field(default=1, ge=0)
    """Of the first weights, the order of the data and all else that is drawn."""
    epochs: int = Field(ge=1)
    """Times that training goes through the data."""
    stop_at_score: float | None = None
    """End after the first epoch whose score is this or better; null: train all epochs."""
    task: SerializeAsAny[Named]
    reducer: SerializeAsAny[Named]
    feedback: SerializeAsAny[Named]
    optimizer: SerializeAsAny[Named]
    schedule: Schedule = Schedule()
    clip: Clip = Clip()
    precision: Precision = "float32"
    """Of forward and backward; scores and all else are float32. tf32: a GPU's matrix products and
    convolutions round their inputs to 10 bits, which is faster (with float32 neither does). bfloat16:
    autocast, with float32 parameters and gradients."""
    deterministic: bool = True
    """Repeat bit for bit on a GPU too; slower there. false: cuDNN also tries which algorithm is fastest."""
    compile: bool = False
    """Compile each worker's forward pass and loss with torch.compile: some minutes before the first step, and
    quicker steps on a GPU. Sums are rounded otherwise, so numbers differ by that from those without it."""
    timeout_seconds: float = Field(default=300.0, gt=0, le=1e6)
    """How long a collective waits for a worker before the run is given up."""
    world_size: int | None = Field(default=None, ge=1)
    """How many workers there are, where no launcher says so: one ./run.sh a worker, by hand."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does, on any worker: stop ends the run; skip leaves the
    step out on all workers before the memory, the threshold or a generator of the exchange has moved."""
    skip_limit: int = Field(default=10, ge=1)
    """So many skipped steps in a row end the run all the same."""
    checkpoint: Checkpoints = Checkpoints()
    resume: Resume = Resume()
    log: Log = Log()

    FREE: ClassVar = frozenset(
        {"epochs", "stop_at_score", "timeout_seconds", "world_size", "on_nonfinite", "skip_limit"}
        | {"checkpoint", "resume", "log"}
    )
    """What may differ from the checkpoint that a run resumes: none of it changes the numbers of a step."""


def notes(settings: RunSettings, device: torch.device) -> list[str]:
    """What the user of these settings should know, on this device, a line each."""
    late = [epoch for epoch in settings.schedule.decay_epochs if epoch >= settings.epochs]
    decays = [
        f"schedule.decay_epochs: {epoch:g} has no effect, since training ends with epoch {settings.epochs}"
        for epoch in late
    ]
    return [*decays, *precision_notes(settings.precision, device)]


def _check_target(target: float | None, task: type[Task]) -> None:
    low, high = task.score_limits
    if target is not None and not low <= target <= high:
        raise ValueError(
            f"stop_at_score: expected a number in [{low:g}, {high:g}], as {task.score} is, got {target:g}"
        )


def check(
    settings: RunSettings,
    tasks: Mapping[str, type[Task]],
    reducers: Mapping[str, type[Reducer]],
    data: Path,
    world_size: int,
    simulated: bool = False,
) -> None:
    """Raise ValueError, in one line, where the chosen parts cannot run, or not together; cheap."""
    if settings.compile and simulated:
        raise ValueError(
            "compile: expected false with --simulate, whose workers would each compile their own"
        )
    task = tasks[settings.task.name]
    _check_target(settings.stop_at_score, task)
    task.check(settings.task, data, world_size)
    feedback, reducer = FEEDBACKS[settings.feedback.name], reducers[settings.reducer.name]
    feedback.check(reducer, settings.reducer, settings.optimizer)
