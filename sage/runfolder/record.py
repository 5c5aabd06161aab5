"""What a run writes and shows while it trains: metrics.jsonl, TensorBoard, progress."""

import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sage import files
from sage.config import Settings
from sage.console import console, describe_gap, first_line, readable_bytes, say
from sage.files import LineFile

PLAIN_SECONDS = 10.0
"""In a log file, a line about a step at most this often."""


class Log(Settings):
    """What is written and shown of a run, and how often."""

    every: int = Field(default=10, ge=1)
    """Steps between two step lines in metrics.jsonl."""
    tensorboard: bool = True
    """Write the numbers of metrics.jsonl to the run's tensorboard/ folder too, where the package tensorboard
    is installed."""
    wandb: str | None = None
    """A Weights & Biases project to send the same numbers to; null: none. A resumed run goes on in the same
    run there, which keeps the first numbers that it got of a step."""

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
    """Writes an event for each line, with all its numbers, and hands it to the system at once. (torch's
    SummaryWriter writes an event for each number, which takes several times as long.)"""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported here: it takes a second, and most workers do not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        (folder / "tensorboard").mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{nanoseconds:09d}"
        self._records = RecordWriter((folder / "tensorboard" / f"events.out.tfevents.{name}").open("xb"))
        self._add(file_version="brain.Event:2")
        if first_step:
            # An epoch's numbers are logged at the step after its last one, so that those of the last epoch
            # stay: only what was logged after first_step is removed.
            self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, values: Mapping[str, float], step: int) -> None:
        numbers = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=numbers))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


class _Wandb(_Sink):
    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str) -> None:
        """Raises ValueError, in one line, where a run cannot be opened."""
        import wandb  # optional

        try:
            run_id = _wandb_id(folder)
            self._run = wandb.init(project=project, name=run_id, id=run_id, resume="allow", dir=folder)
        except Exception as error:  # of many kinds: no key, no such project, no network
            raise ValueError(f"log.wandb: {project}: {first_line(error)}") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        with _as_os_error():
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        with _as_os_error():
            self._run.finish()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise whatever goes wrong as an OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(0, first_line(error)) from error


def _wandb_id(folder: Path) -> str:
    """The run's id at Weights & Biases, which its folder holds, so that a run goes on there after it is
    resumed, whatever its folder is called by then."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        files.write_text(path, f"{folder.name}\n")
    return path.read_text().strip()


def check_wandb(log: Log) -> None:
    """Log in to Weights & Biases where its numbers are to go there; on a terminal it may ask for a key.
    Raises ValueError, in one line, where that fails."""
    if log.wandb is None:
        return
    import wandb

    try:
        wandb.login()  # does nothing where it is set to be offline or disabled
    except Exception as error:
        raise ValueError(f"log.wandb: {first_line(error)}") from None


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
        """Opens no file before it is entered, which raises ValueError or OSError where one cannot be opened.

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
        try:
            self._open(self._folder)
        except BaseException as failure:
            self.__exit__(type(failure), failure)
            raise
        return self

    def _open(self, folder: Path) -> None:
        self._file = LineFile(folder / "metrics.jsonl", self._keep_waiting)
        if self._log.tensorboard and find_spec("tensorboard") is None:
            say("log.tensorboard: the package tensorboard is not installed, so its folder is not written")
        elif self._log.tensorboard:
            self._sinks.append(_TensorBoard(folder, self._first_step))
        if self._log.wandb is not None:
            self._sinks.append(_Wandb(folder, self._log.wandb))
        if console().is_terminal:
            description = TextColumn("{task.description}")
            columns = (BarColumn(20), MofNCompleteColumn(), description, TimeRemainingColumn())
            self._progress = Progress(*columns, console=console(), transient=True)
            self._task = self._progress.add_task("", total=self._total_steps, completed=self._first_step)
            self._progress.start()

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
        if self._sinks:
            values = {f"{line['kind']}/{name}": value for name, value in scalars(line).items()}
            for sink in list(self._sinks):
                self._log_to(sink, values, line["step"])

    def _log_to(self, sink: _Sink, values: Mapping[str, float], step: int) -> None:
        """Pass numbers on; a place that cannot take them gets no more."""
        try:
            sink.log(values, step)
        except OSError as error:
            self._sinks.remove(sink)
            with suppress(OSError):
                sink.close()
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
