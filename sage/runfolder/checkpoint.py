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
from sage.interfaces import TrainingError
from sage.runfolder import manifest
from sage.runfolder.manifest import SHARED, Checkpoint, FileFacts, Manifest, own
from sage.workers.store import RendezvousStore

VISIBLE_SECONDS = 10.0
"""How long a network file system may take to show rank 0 what other hosts wrote."""
State = dict[str, Any]
"""Tensors, numbers, texts, None, and lists and mappings of them: what torch reads with weights_only."""


class Checkpoints(Settings):
    """When a run's state is written down; a signal that ends it early writes one besides."""

    every_epochs: Annotated[int, Field(ge=1)] | None = 1
    """After each so many epochs; null: never for this reason."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """When so many minutes have passed since the last, in the middle of an epoch too; null: never."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest stay while the run goes on; once it is done, its final weights alone."""
    required: bool = True
    """End the run where one cannot be written, on a full disk say; false: go on without, and try again when
    the next is due. What the disk does not take of metrics.jsonl then waits for room."""


class WriteReport(Settings):
    """What a worker tells the others once it has written its files of a checkpoint, or has failed to."""

    files: dict[str, FileFacts] = {}
    """Size and checksum of each file that was written."""
    error: str = ""
    """Why the files could not be written; empty: they were."""


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
        """last_step: of the checkpoint that the run goes on from."""
        self.run, self.settings = run, settings
        self._config, self._board, self._place = config, store, store.place
        self._last_step, self._num_tries = last_step, 0
        self._tried = time.monotonic()

    def is_due(self) -> bool:
        """By rank 0's clock; the others never ask for one."""
        minutes = self.settings.every_minutes
        passed = time.monotonic() - self._tried
        return self._place.rank == 0 and minutes is not None and passed >= 60 * minutes

    def is_due_after(self, epochs: int) -> bool:
        """epochs: done."""
        every = self.settings.every_epochs
        return every is not None and epochs % every == 0

    def save(
        self, step: int, epoch: int, shared: State | None, mine: State, sync: Callable[[], None]
    ) -> None:
        """Write a checkpoint after so many steps and epochs. shared: rank 0's, None on the others; sync: has
        on the disk what goes before it, and may raise OSError.

        Returns when the manifest is there, on no worker before. Where it cannot be written, what was written
        is removed and, where a checkpoint is required, TrainingError raised.
        """
        if step == self._last_step:
            return
        self._num_tries += 1
        states = {own(self._place.rank): mine} | ({SHARED: shared} if shared is not None else {})

        report = self._write(step, states, sync)
        reports = self._board.collect_messages(f"checkpoint/{self._num_tries}", report)

        errors = [f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
        trouble = errors[0] if errors else ""
        if not trouble and self._place.rank == 0:
            trouble = self._finish(step, epoch, reports)
        trouble = self._board.agree(f"manifest/{self._num_tries}", trouble)
        self._tried = time.monotonic()
        if trouble:
            self._give_up(step, trouble)
            return
        self._last_step = step
        if self._place.rank == 0:
            prune(self.run, manifest.manifests(self.run)[: self.settings.keep])

    def saved(self) -> Path | None:
        """The newest checkpoint's folder."""
        return manifest.folder_of(self.run, self._last_step) if self._last_step else None

    def _write(self, step: int, states: Mapping[str, State], sync: Callable[[], None]) -> WriteReport:
        """Write this worker's files."""
        folder = manifest.folder_of(self.run, step)
        try:
            sync()
            return WriteReport(files={name: write_state(folder / name, s) for name, s in states.items()})
        except OSError as error:
            return WriteReport(error=error.strerror or str(error))

    def _finish(self, step: int, epoch: int, reports: Sequence[WriteReport]) -> str:
        """Write the manifest; what went wrong, or nothing."""
        folder = manifest.folder_of(self.run, step)
        try:
            made = Manifest(
                format=manifest.FORMAT,
                step=step,
                epoch=epoch,
                world_size=self._place.world_size,
                config=dict(self._config),
                files={name: facts for report in reports for name, facts in report.files.items()},
            )
            made.check_files()
            _wait_for(Checkpoint(folder, made))
            files.write_text(folder / manifest.NAME, made.model_dump_json(indent=2) + "\n")
        except (OSError, ValueError) as error:
            return f"rank 0: {getattr(error, 'strerror', None) or error}"
        return ""

    def _give_up(self, step: int, trouble: str) -> None:
        shutil.rmtree(manifest.folder_of(self.run, step), ignore_errors=True)
        last = f"the last one is {self.saved()}" if self._last_step else "there is no earlier one"
        told = f"no checkpoint after step {step}: {trouble}; {last}"
        if self.settings.required:
            raise TrainingError(f"{told} (checkpoint.required=false goes on without)")
        if self._place.rank == 0:
            say(told)


def prune(run: Path, kept: Collection[Path]) -> None:
    """Remove a run's checkpoints but those with the kept manifests, and what is left of torn ones; each one's
    manifest first. What cannot be removed stays."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder / manifest.NAME not in kept:
            with suppress(OSError):
                (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def prune_after(checkpoint: Checkpoint) -> None:
    """Remove all that a run left behind the checkpoint that it goes on from."""
    last = manifest.folder_of(checkpoint.run, checkpoint.manifest.step).name
    prune(checkpoint.run, [path for path in manifest.manifests(checkpoint.run) if path.parent.name <= last])


def _wait_for(checkpoint: Checkpoint) -> None:
    """Until rank 0's host sees what the others wrote, which a network file system may show it later."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return checkpoint.check_sizes()
        except ValueError as error:
            if time.monotonic() > deadline:
                told = "runs must lie in a folder that all hosts share (--runs)"
                raise ValueError(f"{error} on rank 0's host; {told}") from None
            time.sleep(0.1)


# --- one file -------------------------------------------------------------------------------------


class _HashingFile:
    """A file that torch.save writes to: counts, sums, and keeps an error for later, since torch would tell
    of its own instead."""

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes, self.sum = 0, hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self.sum.update(data)
            self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """write_whole does."""


def write_state(path: Path, state: State) -> FileFacts:
    """Write a state whole; its size and checksum. Raises OSError."""
    facts: list[FileFacts] = []

    def write(file: BinaryIO) -> None:
        summing = _HashingFile(file)
        torch.save(state, summing)  # type: ignore[arg-type]  # all that it uses of a file
        if summing.error is not None:
            raise summing.error
        facts.append(FileFacts(bytes=summing.num_bytes, sha256=summing.sum.hexdigest()))

    files.write_whole(path, write)
    return facts[0]


def write_weights(path: Path, model: torch.nn.Module) -> None:
    """The model's state_dict; torch.load(path, weights_only=True) reads it."""
    write_state(path, model.state_dict())


def read_state(checkpoint: Checkpoint, name: str) -> State:
    """A file's state, on the CPU. Raises ValueError where it is not what the manifest says, or holds more
    than data: torch runs no code of it."""
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
    """path: for what is said."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch's reader raises of every kind where a file is none of its own
        found = re.search(
            r"WeightsUnpickler error: (.*?)(?:\. |$)", str(error), re.MULTILINE
        )  # after torch's advice
        told = f"expected tensors and numbers alone ({found[1] if found else first_line(error)})"
        raise ValueError(f"{path}: {told}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(state).__name__}")
    return state
