"""Checkpoints: when one is due, how all workers write it together, how a worker reads its part."""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field

from sage import files
from sage.config import Settings
from sage.console import first_line, say
from sage.files import RunFolderLost
from sage.interfaces import TrainingError
from sage.runfolder import manifest
from sage.runfolder.manifest import BEST, SHARED, Checkpoint, FileFacts, Manifest, worker_file
from sage.workers.store import RendezvousStore

VISIBLE_SECONDS = 10.0
"""How long a network file system may take to show rank 0 what other hosts wrote."""
State = dict[str, Any]
"""Tensors, numbers, texts, None, and lists and mappings of them: what torch reads with weights_only."""


class Checkpoints(Settings):
    """When a checkpoint is written; a signal that stops the run writes one in addition."""

    every_epochs: Annotated[int, Field(ge=1)] | None = 1
    """After each so many epochs; null: never for this reason."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """When so many minutes have passed since the last, in the middle of an epoch too; null: never."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept while the run trains; once it is done, only its weights are."""
    best: bool = False
    """Keep the weights of the epoch with the best score (the first, of several) too: in each checkpoint, and
    in checkpoints/best.pt once the run is done."""
    required: bool = True
    """End the run where one cannot be written, on a full disk say; false: train on without it, and try again
    when the next is due. Lines of metrics.jsonl then wait until the disk has room for them."""


class WriteReport(Settings):
    """What a worker tells the others once it has written its files of a checkpoint, or has failed to."""

    files: dict[str, FileFacts] = {}
    """Size and checksum of each file that was written."""
    error: str = ""
    """Why the files could not be written; empty: they were."""
    is_final: bool = False
    """Whether the run cannot continue even where a checkpoint is not required."""


class CheckpointWriter:
    """Writes the checkpoints of a run; every worker calls the same methods at the same steps."""

    def __init__(
        self,
        run: Path,
        config: Mapping[str, Any],
        settings: Checkpoints,
        store: RendezvousStore,
        last_step: int = 0,
    ) -> None:
        """last_step: of the checkpoint that the run was resumed from; 0: of none."""
        self.run, self.settings = run, settings
        self._config, self._store, self._place = config, store, store.place
        self._last_step, self._num_attempts = last_step, 0
        self._last_attempt = time.monotonic()

    def is_due(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; never on the other workers."""
        minutes = self.settings.every_minutes
        passed = time.monotonic() - self._last_attempt
        return self._place.rank == 0 and minutes is not None and passed >= 60 * minutes

    def is_due_after(self, epochs: int) -> bool:
        """Whether a checkpoint is due because so many epochs are done."""
        every = self.settings.every_epochs
        return every is not None and epochs % every == 0

    def save(
        self,
        step: int,
        epoch: int,
        shared: State | None,
        own: State,
        sync: Callable[[], None],
        best: State | None = None,
    ) -> None:
        """Write a checkpoint after so many steps and epochs, unless it is written already.

        shared: the state that all workers have in common, from rank 0; None on the others. own: this
        worker's. sync: forces to the disk what must be there before the checkpoint; may raise OSError. best:
        the best epoch's weights, from rank 0, where they are kept.

        No worker returns before the manifest is written. Where the checkpoint cannot be written, its files
        are removed; raises TrainingError then if a checkpoint is required.
        """
        if step == self._last_step:
            return
        self._num_attempts += 1
        given = {worker_file(self._place.rank): own, SHARED: shared, BEST: best}
        states = {name: state for name, state in given.items() if state is not None}
        report = self._write_states(step, states, sync)
        reports = self._store.collect_messages(f"checkpoint/{self._num_attempts}", report)

        errors = [f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
        error = errors[0] if errors else ""
        if not error and self._place.rank == 0:
            error = self._write_manifest(step, epoch, reports)
        error = self._store.agree(f"manifest/{self._num_attempts}", error)

        self._last_attempt = time.monotonic()
        if error:
            self._handle_failure(step, error, is_final=any(report.is_final for report in reports))
            return
        self._last_step = step
        if self._place.rank == 0:
            prune(self.run, manifest.manifests(self.run)[: self.settings.keep])

    def saved(self) -> Path | None:
        """The newest checkpoint's folder."""
        return manifest.folder_of(self.run, self._last_step) if self._last_step else None

    def _write_states(self, step: int, states: Mapping[str, State], sync: Callable[[], None]) -> WriteReport:
        """Write this worker's files, a state each."""
        folder = manifest.folder_of(self.run, step)
        try:
            sync()
            _check_present(self.run)
            return WriteReport(files={name: write_state(folder / name, s) for name, s in states.items()})
        except RunFolderLost as error:
            return WriteReport(error=str(error), is_final=True)
        except OSError as error:
            return WriteReport(error=error.strerror or str(error))

    def _write_manifest(self, step: int, epoch: int, reports: Sequence[WriteReport]) -> str:
        """Write the manifest once all workers' files can be seen; returns what went wrong, or nothing."""
        folder = manifest.folder_of(self.run, step)
        try:
            written = Manifest(
                format=manifest.FORMAT,
                step=step,
                epoch=epoch,
                world_size=self._place.world_size,
                config=dict(self._config),
                files={name: facts for report in reports for name, facts in report.files.items()},
            ).sealed()
            written.check_files()
            _wait_until_visible(Checkpoint(folder, written))
            files.write_text(folder / manifest.NAME, written.model_dump_json(indent=2) + "\n")
        except (OSError, ValueError) as error:
            return f"rank 0: {getattr(error, 'strerror', None) or error}"
        return ""

    def _handle_failure(self, step: int, error: str, *, is_final: bool) -> None:
        """Remove what was written of a checkpoint; raise TrainingError, or say that the run trains on."""
        shutil.rmtree(manifest.folder_of(self.run, step), ignore_errors=True)
        last = f"the last one is {self.saved()}" if self._last_step else "there is no earlier one"
        message = f"no checkpoint after step {step}: {error}; {last}"
        if is_final:
            raise TrainingError(message)
        if self.settings.required:
            raise TrainingError(f"{message} (checkpoint.required=false trains on without it)")
        if self._place.rank == 0:
            say(message)


def _check_present(run: Path) -> None:
    """Raise RunFolderLost where a run's folder is missing, so that no half of it is made anew. A network file
    system may show it late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not run.is_dir():
        if time.monotonic() > deadline:
            raise RunFolderLost(f"{run}: the run's folder is no longer there")
        time.sleep(0.1)


def prune(run: Path, kept: Collection[Path]) -> None:
    """Remove a run's checkpoints, complete or not, except those whose manifests are in kept.

    Of each one the manifest is removed first. What cannot be removed stays.
    """
    for folder in (run / "checkpoints").glob("step-*"):
        if folder / manifest.NAME not in kept:
            with suppress(OSError):
                (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def prune_after(checkpoint: Checkpoint) -> None:
    """Remove all checkpoints of a run that are newer than the one it is resumed from."""
    last = manifest.folder_of(checkpoint.run, checkpoint.manifest.step).name
    prune(checkpoint.run, [path for path in manifest.manifests(checkpoint.run) if path.parent.name <= last])


def _wait_until_visible(checkpoint: Checkpoint) -> None:
    """Wait until rank 0's host sees the files of all workers, which a network file system may show late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return checkpoint.check_sizes()
        except ValueError as error:
            if time.monotonic() > deadline:
                advice = "runs must lie in a folder that all hosts share (--runs)"
                raise ValueError(f"{error} on rank 0's host; {advice}") from None
            time.sleep(0.1)


# --- one file -------------------------------------------------------------------------------------


class _HashingFile:
    """Passes on to a file what torch.save writes, and keeps its size and checksum.

    An error is kept too, to be raised afterwards: torch would replace it with an error of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes, self.checksum = 0, hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self.checksum.update(data)
            self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing: write_whole flushes the file."""


def write_state(path: Path, state: State) -> FileFacts:
    """Write a state to a file, whole or not at all; returns its size and checksum. Raises OSError."""
    facts: list[FileFacts] = []

    def write(file: BinaryIO) -> None:
        hashing = _HashingFile(file)
        torch.save(state, hashing)  # type: ignore[arg-type]  # it has all that torch.save uses of a file
        if hashing.error is not None:
            raise hashing.error
        facts.append(FileFacts(bytes=hashing.num_bytes, sha256=hashing.checksum.hexdigest()))

    files.write_whole(path, write)
    return facts[0]


def read_weights(path: Path) -> State:
    """Read a file of weights that a run has left, to the CPU. Raises ValueError where it cannot be read, or
    holds more than data."""
    try:
        with files.open_regular(path) as file:
            return _load(path, file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def read_state(checkpoint: Checkpoint, name: str) -> State:
    """Read a file's state, to the CPU. Raises ValueError where the file is not what the manifest says, or
    holds more than data: torch runs no code of it."""
    with checkpoint.open(name) as file:
        return _load(checkpoint.folder / name, file)


def check_readable(checkpoint: Checkpoint) -> None:
    """Raise ValueError where a file is not what the manifest says, or holds more than data."""
    checkpoint.check_sizes()
    for name in checkpoint.manifest.files:
        path = checkpoint.folder / name
        with checkpoint.open(name):
            _load(path, path, mmap=True)  # reads no tensor


def _load(path: Path, source: BinaryIO | Path, **options: bool) -> State:
    """Read a state from source. path: the file's name in error messages."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises errors of every kind for a file that it did not write
        problem = f"expected only tensors and numbers ({_reason_of(error)})"
        raise ValueError(f"{path}: {problem}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(state).__name__}")
    return state


def _reason_of(error: Exception) -> str:
    """Why torch could not load a file, without its advice on how to load it all the same."""
    found = re.search(r"WeightsUnpickler error: (.*?)(?:\. |$)", str(error), re.MULTILINE)
    return found[1] if found else first_line(error)
