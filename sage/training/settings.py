"""A whole experiment's settings, and whether its parts go together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator

from sage.config import Named, Settings
from sage.exchange.feedback import FEEDBACKS
from sage.exchange.scaling import SCALINGS, ConstantSettings
from sage.interfaces import Reducer, Task
from sage.runfolder.checkpoint import Checkpoints
from sage.runfolder.record import Log
from sage.training.optim import Clip, Schedule
from sage.training.precision import Precision, precision_notes

DEFAULT_BUCKET_MB = 25.0
"""DDP's own, which it follows in a way of its own: its first bucket is smaller."""


class Resume(Settings):
    """What --resume does."""

    world_size: Literal["refuse", "reshard"] = "refuse"
    """For a checkpoint of another number of workers: refuse it; reshard: every worker gets the mean of the
    old residuals, which conserves their mean, and new generators."""


class Overlap(Settings):
    """Exchange gradients while backward computes the next ones, through DistributedDataParallel (DDP)."""

    bucket_mb: float = Field(default=DEFAULT_BUCKET_MB, gt=0)
    """Gradients that travel together, in MiB. Each bucket is an exchange of its own: a method that compares
    elements of the whole gradient (global_topk, a threshold) compares those of a bucket, and a generator of
    each bucket draws. 25 is DDP's own default, of which the first bucket has 1 MiB."""
    find_unused_parameters: bool = False
    """For a model of which a step may not use all parameters; DDP then searches them in every step."""


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
    scaling: SerializeAsAny[Named] = ConstantSettings()
    """What the reducer's density is in each step."""
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
    accumulate_steps: int = Field(default=1, ge=1)
    """So many batches a worker are one step: their mean gradient is exchanged and applied once. What is left
    at the end of an epoch is a step of fewer batches. BatchNorm sees each batch alone; a language model's
    hidden state goes from batch to batch."""
    overlap: Overlap | None = None
    """true, or a mapping: exchange gradients while backward computes the next ones. null or false: once
    backward is done. The float32 exact reducer is DDP's own all-reduce then."""
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

    @field_validator("overlap", mode="before")
    @classmethod
    def _overlap_by_default(cls, value: Any) -> Any:
        """true is a mapping without keys, false is null."""
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def steps_of(self, num_batches: int) -> int:
        """How many steps of the optimizer a worker makes of so many batches."""
        return -(-num_batches // self.accumulate_steps)  # rounded up

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


def check_overlap(settings: RunSettings, world_size: int, simulated: bool) -> None:
    """Raise ValueError, in one line, where what is set does not go with overlap."""
    clip = settings.clip
    if simulated:
        raise ValueError("overlap: expected null with --simulate, whose workers compute one at a time")
    if world_size == 1:
        raise ValueError("overlap: expected null, or several workers (--workers N), got one")
    if settings.compile:
        raise ValueError("compile: expected false with overlap, with which it is not tested, got true")
    if clip.norm is not None and clip.before_reduce:
        raise ValueError(
            "clip.before_reduce: expected false with overlap, which sends the first bucket before the norm "
            "of the whole gradient is known, got true"
        )
    if not SCALINGS[settings.scaling.name].serves_buckets:
        raise ValueError(
            "scaling.name: expected another with overlap, whose buckets' times are not the step's, "
            f"got {settings.scaling.name}"
        )
    if settings.precision == "tf32" and not is_plain_average(settings):
        raise ValueError(
            "precision: expected float32 or bfloat16 with overlap, got tf32, which is on or off for the "
            "whole process: the reducer's own products would be rounded while backward computes"
        )


def is_plain_average(settings: RunSettings) -> bool:
    """Whether the reducer is the exact mean in float32, of which no feedback is left."""
    return settings.reducer.name == "exact" and getattr(settings.reducer, "dtype", None) == "float32"


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
    if settings.overlap is not None:
        check_overlap(settings, world_size, simulated)
    task = tasks[settings.task.name]
    _check_target(settings.stop_at_score, task)
    task.check(settings.task, data, world_size)
    feedback, reducer = FEEDBACKS[settings.feedback.name], reducers[settings.reducer.name]
    feedback.check(reducer, settings.reducer, settings.optimizer)
    SCALINGS[settings.scaling.name].check(settings.scaling, reducer, settings.reducer, simulated)
