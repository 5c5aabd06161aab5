"""The format of a checkpoint on disk, and how one is found and verified. Imports no torch.

runs/<config>/<run id>/checkpoints/step-00001234/    shared.pt  rank0.pt  rank1.pt ...  manifest.json
                                                     best.pt, where the best epoch's weights are kept

The manifest is written last and names every file with its size and checksum: a folder without a manifest is
not a checkpoint.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import Field, ValidationError

from sage import files
from sage.config import Settings, one_line

FORMAT = 3
"""The version of this format; a program reads no other."""
NAME = "manifest.json"
SHARED = "shared.pt"
"""The name of the file of what all workers have in common."""
FINAL = "final.pt"
"""The name, in checkpoints/, of the weights of a run that is done."""
BEST = "best.pt"
"""The name of the file of the best epoch's weights; a checkpoint may be without it."""


def worker_file(rank: int) -> str:
    """The name of a worker's file."""
    return f"rank{rank}.pt"


def folder_of(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint after so many steps."""
    return run / "checkpoints" / f"step-{step:08d}"


class FileFacts(Settings):
    """A file's size and checksum."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Settings):
    """What a checkpoint says of itself."""

    format: int
    step: int = Field(ge=0)
    """Steps done."""
    epoch: int = Field(ge=0)
    """Epochs done."""
    world_size: int = Field(ge=1)
    config: dict[str, Any]
    """The run's resolved configuration."""
    files: dict[str, FileFacts]
    checksum: str = ""
    """Of all the rest, as sealed() makes it."""

    def sealed(self) -> "Manifest":
        """The same manifest with its checksum."""
        return self.model_copy(update={"checksum": checksum_of(self.model_dump(mode="json"))})

    def check_files(self) -> None:
        """Raise ValueError unless files names the shared file and one file of each worker, and no other but
        that of the best weights."""
        expected = {SHARED, *map(worker_file, range(self.world_size))}
        for name in sorted(expected - self.files.keys()):
            raise ValueError(f"files: expected {name} among them")
        for name in sorted(self.files.keys() - expected - {BEST}):
            raise ValueError(f"files: expected no {name} among them")


def checksum_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content but for its checksum."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class FileVersion(NamedTuple):
    """What the file system changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: BinaryIO) -> "FileVersion":
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. It remembers which files it has verified, so that none is hashed twice."""

    folder: Path
    manifest: Manifest
    _verified: dict[str, FileVersion] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By name, the version of a file that had the manifest's checksum."""

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.parent.parent

    def check_sizes(self) -> None:
        """Raise ValueError where a file is missing or its size is not the manifest's."""
        for name, facts in self.manifest.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts.bytes:
                found = "it is missing" if size is None else f"got {size}"
                raise ValueError(f"{path}: expected {facts.bytes} bytes, as {NAME} says, {found}")

    def check_contents(self) -> None:
        """Raise ValueError where a file is not what the manifest says. Reads every file once."""
        self.check_sizes()
        for name in self.manifest.files:
            with self.open(name):
                pass

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading; what is read from it has the manifest's checksum.

        Raises ValueError where it has not, and at the end where the file was altered meanwhile.
        """
        path = self.folder / name
        try:
            file = files.open_regular(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None

        with file:
            version = FileVersion.of(file)
            if self._verified.get(name) != version:
                self._verify(name, file)
                self._verified[name] = version
            yield file
            if FileVersion.of(file) != version:
                raise ValueError(f"{path}: the file was altered while it was read")

    def _verify(self, name: str, file: BinaryIO) -> None:
        """Raise ValueError where an open file's checksum is not the manifest's."""
        try:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a file
            file.seek(0)
        except OSError as error:
            raise ValueError(f"{self.folder / name}: cannot be read: {error.strerror}") from None
        if checksum != self.manifest.files[name].sha256:
            problem = "expected the checksum in its manifest, got another: the file was altered"
            raise ValueError(f"{self.folder / name}: {problem}")


# --- reading --------------------------------------------------------------------------------------


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint in a folder. Raises ValueError, in one line, where its manifest is missing or
    cannot be used; its other files are not looked at."""
    path = folder / NAME
    content = _read_json(path)
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        problem = "another version of this program made it"
        raise ValueError(f"{path}: format: expected {FORMAT}, got {one_line(version)}; {problem}")

    if content.get("checksum") != checksum_of(content):
        raise ValueError(f"{path}: expected its own checksum, got another: the manifest was altered")
    try:
        manifest = Manifest.model_validate(content)
        manifest.check_files()
        _check_step(manifest, folder)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint(folder, manifest)


def _check_step(manifest: Manifest, folder: Path) -> None:
    """Raise ValueError where the folder's name is that of another step: what is newer than a checkpoint is
    told by the names."""
    expected = folder_of(Path(), manifest.step).name
    if folder.name != expected:
        raise ValueError(f"step: expected a folder {expected} for step {manifest.step}, got {folder.name}")


def _read_json(path: Path) -> Any:
    try:
        return files.parse_json(files.read_bytes(path))
    except OSError as error:
        raise ValueError(f"{path}: expected a checkpoint's manifest: {error.strerror}") from None
    except ValueError:  # neither JSON nor UTF-8
        raise ValueError(f"{path}: expected a checkpoint's manifest, but it is not JSON") from None


def manifests(run: Path) -> list[Path]:
    """The paths of all manifests of a run, newest first."""
    return sorted((run / "checkpoints").glob(f"step-*/{NAME}"), reverse=True)


def newest(run: Path) -> Checkpoint:
    """A run's newest checkpoint, of which no file is missing or truncated.

    Raises ValueError where there is none, or where the newest is damaged: an older one is resumed only where
    it is named, and the message names it.
    """
    found = manifests(run)
    if not found:
        raise ValueError(f"--resume: expected a run's folder with a whole checkpoint, found none in {run}")
    try:
        checkpoint = read(found[0].parent)
        checkpoint.check_sizes()
        return checkpoint
    except ValueError as error:
        raise ValueError(
            f"--resume: the newest checkpoint is damaged: {error}; {older_whole(found[0])}"
        ) from None


def older_whole(path: Path) -> str:
    """In words, how to resume from a whole checkpoint older than the one with this manifest. Reads its
    files."""
    for older in manifests(path.parent.parent.parent):
        if older.parent.name >= path.parent.name:
            continue
        try:
            checkpoint = read(older.parent)
            checkpoint.check_contents()
        except ValueError:
            continue
        return f"an older one is whole: --resume {shlex.quote(str(older.parent))}"
    return "there is no older one that is whole"
