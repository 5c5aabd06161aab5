"""What a run writes and shows while it trains: metrics.jsonl, TensorBoard, progress."""

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sage import files
from sage.config import Settings
from sage.console import console, describe_gap, readable_bytes, say
from sage.files import LineFile

PLAIN_SECONDS = 10.0
"""In a log file, a line about a step at most this often."""


class Log(Settings):
    """What is written and shown of a run, and how often."""

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


class _Sink(ABC):
    """Another place for the numbers of metrics.jsonl. Its methods may raise OSError."""

    name: str

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still buffered."""


class _TensorBoard(_Sink):
    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported here: it takes seconds, and most workers do not need it.
        from torch.utils.tensorboard import SummaryWriter

        # An epoch's numbers are logged at the step after its last one, so that those of the last epoch stay:
        # only what was logged after first_step is removed.
        self._writer = SummaryWriter(
            folder / "tensorboard", purge_step=first_step + 1 if first_step else None
        )
        threading.excepthook = _ignore_errors_of_the_disk  # in the writer's thread: the next log raises them

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _ignore_errors_of_the_disk(arguments: threading.ExceptHookArgs) -> None:
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


class _Wandb(_Sink):
    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str) -> None:
        import wandb  # optional

        run_id = folder.name
        self._run = wandb.init(project=project, name=run_id, id=run_id, resume="allow", dir=folder)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Recorder:
    """Writes metrics.jsonl and shows the progress of rank 0; the other ranks' does nothing."""

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        log: Log,
        first_step: int = 0,
        keep_waiting: bool = False,
    ) -> None:
        """Opens no file before it is entered.

        folder: the run's, or None on the other ranks. first_step: where a resumed run continues.
        keep_waiting: lines wait for room on a full disk, instead of raising OSError.
        """
        self._file: LineFile | None = None
        self._progress: Progress | None = None
        self._sinks: list[_Sink] = []
        self._last_shown = time.monotonic()
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
        if self._file:
            self._close(self._file, failure)

    def _close(self, file: LineFile, failure: BaseException | None) -> None:
        """Close metrics.jsonl. Raises OSError where its last lines are lost, unless the run failed before."""
        try:
            file.close()
        except OSError as error:
            if failure is None:
                raise
            if not isinstance(failure, OSError):  # such a failure says as much
                say(f"{error.filename}: {error.strerror}; its last lines are lost")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, handed to the system at once: a run that dies loses none."""
        if self._file:
            self._write_to(self._file, line)
        values = {f"{line['kind']}/{name}": value for name, value in scalars(line).items()}
        for sink in list(self._sinks):
            try:
                sink.log(values, line["step"])
            except OSError as error:
                self._sinks.remove(sink)
                say(f"{sink.name}: {error.strerror}; it gets no more numbers")

    def _write_to(self, file: LineFile, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; say so when lines begin to wait for room on the disk."""
        before = file.error
        file.write(json.dumps(line, allow_nan=False))
        if file.error not in (None, before):
            say(f"{file.path}: {file.error}; new lines wait until there is room")

    def sync(self) -> None:
        """Force all lines to the disk. Raises OSError, RunFolderLost where the file is no longer in place."""
        if self._file:
            self._file.sync()
            self._file.check_in_place()

    def step_done(self, step: int) -> None:
        """Move the progress bar. step: how many steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def show_step(self, line: Mapping[str, Any]) -> None:
        """Show a step line to a person: beside the progress bar, or now and then in a log file."""
        if self._file is None:
            return
        text = f"loss {line['loss']:.4f}  density {line['density']:.3g}"
        if self._progress:
            self._progress.update(self._task, description=text)
        elif time.monotonic() - self._last_shown >= PLAIN_SECONDS:
            self._last_shown = time.monotonic()
            say(f"  step {line['step'] + 1}/{self._total_steps}  {text}")

    def show_epoch(self, line: Mapping[str, Any], epochs: int) -> None:
        """Show an epoch line to a person, within 80 columns."""
        if self._file is None:
            return
        self._last_shown = time.monotonic()
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


def cut_back(path: Path, epochs: int, steps: int) -> str:
    """Keep only the lines of metrics.jsonl that belong to so many epochs and steps, so that a resumed run
    writes no step twice. An incomplete last line is removed too. Returns which of the epochs have no line, in
    words; empty where all have one.

    Raises ValueError, and changes nothing, where another line was not written by this program.
    """
    *lines, _ = files.read_bytes(path).split(b"\n") if path.exists() else [b""]
    kept = [
        text + b"\n" for number, text in enumerate(lines, 1) if _is_within(text, number, path, epochs, steps)
    ]
    files.write_whole(path, lambda file: file.writelines(kept))
    epochs_kept = {line["epoch"] for line in map(files.parse_json, kept) if line["kind"] == "epoch"}
    return describe_gap(epochs_kept, epochs)


def _is_within(text: bytes, number: int, path: Path, epochs: int, steps: int) -> bool:
    """Whether a line of metrics.jsonl belongs to so many epochs and steps."""
    try:
        line = files.parse_json(text)
        within: bool = line["step"] < steps if line["kind"] == "step" else line["epoch"] < epochs
    except (ValueError, KeyError, TypeError):
        problem = f"expected a JSON object with kind, epoch and step, got {text[:60]!r}"
        raise ValueError(f"{path}: line {number}: {problem}") from None
    return within
