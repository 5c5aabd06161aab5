"""What a run writes and shows while it trains: metrics.jsonl, TensorBoard, progress."""

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sage.config import Settings
from sage.console import console, readable_bytes, say
from sage.files import LineFile, write_whole

PLAIN_SECONDS = 10.0
"""In a log file, a line about a step at most this often."""


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


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        # Here: it takes seconds, and most workers need it not.
        from torch.utils.tensorboard import SummaryWriter

        # An epoch's numbers stand at the step after its last: those of the last one before are to stay.
        self._writer = SummaryWriter(
            folder / "tensorboard", purge_step=first_step + 1 if first_step else None
        )
        self.close = self._writer.close
        threading.excepthook = _tell_but_full_disks  # its thread's OSError is raised by its next log

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _tell_but_full_disks(arguments: threading.ExceptHookArgs) -> None:
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


class _Wandb:
    def __init__(self, folder: Path, project: str) -> None:
        import wandb  # optional

        name = folder.name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=folder)
        self.close = self._run.finish

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


class Recorder:
    """metrics.jsonl and the progress display of rank 0; the other ranks have one that does nothing."""

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        log: Log,
        first_step: int = 0,
        keep_waiting: bool = False,
    ) -> None:
        """folder: the run's, or None for a worker that does not speak; no file is opened before this is
        entered. first_step: where a resumed run goes on; keep_waiting: for room on a full disk, instead of an
        OSError."""
        self._file: LineFile | None = None
        self._progress: Progress | None = None
        self._sinks: list[_TensorBoard | _Wandb] = []
        self._told = time.monotonic()
        self._folder, self._log, self._keep_waiting = folder, log, keep_waiting
        self._total_steps, self._first_step = total_steps, first_step

    def __enter__(self) -> Self:
        if self._folder is None:
            return self
        self._file = LineFile(self._folder / "metrics.jsonl", self._keep_waiting)
        if self._log.tensorboard:
            self._sinks.append(_TensorBoard(self._folder, self._first_step))
        if self._log.wandb is not None:
            self._sinks.append(_Wandb(self._folder, self._log.wandb))
        if console().is_terminal:
            description = TextColumn("{task.description}")
            columns = (BarColumn(20), MofNCompleteColumn(), description, TimeRemainingColumn())
            self._progress = Progress(*columns, console=console(), transient=True)
            self._task = self._progress.add_task("", total=self._total_steps, completed=self._first_step)
            self._progress.start()
        return self

    def __exit__(self, kind: object, failure: BaseException | None, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        for sink in self._sinks:
            with suppress(OSError):  # metrics.jsonl has the same numbers
                sink.close()
        try:
            if self._file:
                self._file.close()
        except OSError as error:
            if failure is None:
                raise
            if not isinstance(failure, OSError):  # else it says so itself
                say(f"{error.filename}: {error.strerror}; its last lines are lost")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, handed to the system at once: a run that dies loses none."""
        if self._file:
            before = self._file.trouble
            self._file.write(json.dumps(line, allow_nan=False))
            if self._file.trouble not in (None, before):
                say(f"{self._file.path}: {self._file.trouble}; what comes waits for room")
        values = {f"{line['kind']}/{name}": value for name, value in scalars(line).items()}
        for sink in list(self._sinks):
            try:
                sink.log(values, line["step"])
            except OSError as error:
                self._sinks.remove(sink)
                say(f"{type(sink).__name__[1:]}: {error.strerror}; it gets no more numbers")

    def sync(self) -> None:
        """Have all lines on the disk. Raises OSError."""
        if self._file:
            self._file.sync()

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


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line under names joined by slashes: {"test": {"loss": 1}} -> {"test/loss": 1}."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def cut_back(path: Path, epochs: int, steps: int) -> None:
    """Keep of metrics.jsonl what was written in so many steps and epochs: no step appears twice. A last line
    that was cut off goes too. Raises ValueError where another line is no object."""
    kept: list[bytes] = []
    *texts, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            goes = line["step"] >= steps if line["kind"] == "step" else line["epoch"] >= epochs
        except (ValueError, KeyError, TypeError):
            told = f"expected a JSON object with kind, epoch and step, got {text[:60]!r}"
            raise ValueError(f"{path}: line {number}: {told}") from None
        if not goes:
            kept.append(text + b"\n")
    write_whole(path, lambda file: file.writelines(kept))
