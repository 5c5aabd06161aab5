"""What a run records and shows: metrics.jsonl, means over workers, progress on a terminal or plain lines.

A library part that has something to tell a person calls say; only rank 0 speaks.
"""

import json
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sage.clock import Clock
from sage.config import Settings
from sage.interfaces import Communicator

PLAIN_SECONDS = 10.0
"""In a log file, a line about a step at most this often."""

_console = Console(stderr=False, highlight=False, soft_wrap=True)


class Log(Settings):
    every: int = Field(default=10, ge=1)
    """Steps between two step lines in metrics.jsonl."""
    tensorboard: bool = True
    """Write the numbers of metrics.jsonl to the run's tensorboard/ folder too."""
    wandb: str | None = None
    """A Weights & Biases project to send the same numbers to; null: none."""

    @model_validator(mode="after")
    def _wandb_is_installed(self) -> Self:
        if self.wandb is not None and find_spec("wandb") is None:
            raise ValueError(f"wandb: {self.wandb!r} needs the package wandb: pip install wandb")
        return self


def say(text: str) -> None:
    """Tell the user something, in a line of its own that a running progress bar does not tear."""
    _console.print(text, markup=False)


def mean_over_workers(
    values: Mapping[str, float], comm: Communicator, device: torch.device
) -> dict[str, float]:
    """Each value's mean over workers, which all have the same names in the same order."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    comm.all_reduce(packed)
    return dict(zip(values, (packed / comm.world_size).tolist(), strict=True))


def density_summary(densities: list[float]) -> dict[str, float]:
    """Mean, standard deviation and 99th percentile over steps."""
    values = torch.tensor(densities, dtype=torch.float64)
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "p99": values.quantile(0.99).item(),
    }


class Meter:
    """Adds up losses, densities, bytes and seconds, and turns them into the lines of metrics.jsonl.

    Every worker calls the same methods; values in a line are means over workers.
    """

    BYTES = ("payload", "padding", "wire")

    def __init__(
        self,
        take_bytes: Callable[[], Mapping[str, float]],
        clock: Clock,
        side: Communicator,
        device: torch.device,
    ) -> None:
        """take_bytes: the ledger's take."""
        self._take_bytes, self._clock, self._side, self._device = take_bytes, clock, side, device
        self._losses: list[Tensor] = []  # of the steps since the last step line
        self._epoch: dict[str, float] = {}
        self._epoch_losses: list[float] = []
        self._epoch_densities: list[float] = []
        self._densities: list[float] = []
        self._totals: dict[str, float] = {}
        self._started = time.monotonic()

    def add_step(self, loss: Tensor, density: float) -> None:
        """loss: a scalar on the device; it is read with the next step line, not now."""
        self._losses.append(loss)
        self._epoch_densities.append(density)

    def step_line(self, values: Mapping[str, float]) -> tuple[dict[str, Any], list[float]]:
        """Means over workers: of values, and of bytes and seconds per step since the last step line.

        Also returns the mean loss of each of these steps, oldest first. On a GPU this waits for its work.
        """
        losses = torch.stack(self._losses).double().to(self._device)
        self._side.all_reduce(losses)
        mean_losses: list[float] = (losses / self._side.world_size).tolist()
        drained = self._drain()
        per_step = {name: total / len(self._losses) for name, total in drained.items()}
        self._losses.clear()
        self._epoch_losses += mean_losses
        means = mean_over_workers({**values, **per_step}, self._side, self._device)
        seconds = {name: means.pop(f"seconds.{name}") for name in self._seconds_of(per_step)}
        return {"loss": mean_losses[-1], **means, "seconds": seconds}, mean_losses

    def epoch_line(self) -> dict[str, Any]:
        """The totals since the last epoch line."""
        self._drain()
        wall, self._started = time.monotonic() - self._started, time.monotonic()
        totals = mean_over_workers({**self._epoch, "seconds.wall": wall}, self._side, self._device)
        for name, total in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + total
        line = {
            "train": {"loss": sum(self._epoch_losses) / len(self._epoch_losses)},
            "density": density_summary(self._epoch_densities),
            "bytes": {name: totals[f"{name}_bytes"] for name in self.BYTES},
            "seconds": {name: totals[f"seconds.{name}"] for name in self._seconds_of(totals)},
        }
        self._densities += self._epoch_densities
        self._epoch, self._epoch_losses, self._epoch_densities = {}, [], []
        return line

    def totals(self) -> dict[str, Any]:
        """The whole run's density, bytes and seconds."""
        return {
            "density": density_summary(self._densities),
            "totals": {
                **{f"{name}_bytes": self._totals[f"{name}_bytes"] for name in self.BYTES},
                "seconds": {name: self._totals[f"seconds.{name}"] for name in self._seconds_of(self._totals)},
            },
        }

    def _drain(self) -> dict[str, float]:
        """Bytes and seconds since the last call, which the epoch's totals take over."""
        counted = self._take_bytes()
        drained = {f"{name}_bytes": float(counted[f"{name}_bytes"]) for name in self.BYTES}
        drained |= {f"seconds.{name}": seconds for name, seconds in self._clock.take().items()}
        for name, value in drained.items():
            self._epoch[name] = self._epoch.get(name, 0.0) + value
        return drained

    @staticmethod
    def _seconds_of(values: Mapping[str, float]) -> list[str]:
        return [name.removeprefix("seconds.") for name in values if name.startswith("seconds.")]


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line under names joined by slashes: {"test": {"loss": 1}} -> {"test/loss": 1}."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # here: it takes seconds, and most workers need it not

        self._writer = SummaryWriter(folder / "tensorboard")
        self.close = self._writer.close

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class _Wandb:
    def __init__(self, folder: Path, project: str) -> None:
        import wandb  # optional

        self._run = wandb.init(project=project, name=folder.name, dir=folder)
        self.close = self._run.finish

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


class Recorder:
    """metrics.jsonl and the progress display of rank 0; the other ranks have one that does nothing."""

    def __init__(self, folder: Path | None, total_steps: int, log: Log) -> None:
        """folder: the run's, or None for a worker that does not speak."""
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        self._sinks: list[_TensorBoard | _Wandb] = []
        self._told = time.monotonic()
        self._total_steps = total_steps
        if folder is None:
            return
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        if log.tensorboard:
            self._sinks.append(_TensorBoard(folder))
        if log.wandb is not None:
            self._sinks.append(_Wandb(folder, log.wandb))
        if _console.is_terminal:
            description = TextColumn("{task.description}")
            columns = (BarColumn(20), MofNCompleteColumn(), description, TimeRemainingColumn())
            self._progress = Progress(*columns, console=_console, transient=True)
            self._task = self._progress.add_task("", total=total_steps)

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        if self._file:
            self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, handed to the system at once: a run that dies loses none."""
        if self._file:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.log({f"{line['kind']}/{name}": value for name, value in scalars(line).items()}, line["step"])

    def step_done(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def show_step(self, line: Mapping[str, Any]) -> None:
        """A step line as a person reads it: beside the bar, or now and then in a log file."""
        if self._file is None:
            return
        text = f"loss {line['loss']:.4f}  density {line['density']:.3g}"
        if self._progress:
            self._progress.update(self._task, description=text)
        elif time.monotonic() - self._told >= PLAIN_SECONDS:
            self._told = time.monotonic()
            say(f"  step {line['step'] + 1}/{self._total_steps}  {text}")

    def show_epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        """An epoch line as a person reads it, within 80 columns."""
        if self._file is None:
            return
        self._told = time.monotonic()
        say(
            f"epoch {line['epoch'] + 1}/{epochs}  loss {line['train']['loss']:.4f}  "
            f"{line['score']['name']} {line['score']['value']:.4f}  density {line['density']['mean']:.3g}  "
            f"{readable_bytes(line['bytes']['payload'])}  {line['seconds']['wall']:.1f} s"
        )


def readable_bytes(count: float) -> str:
    """1234567 -> '1.23 MB'; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
