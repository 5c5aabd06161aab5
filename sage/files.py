"""Files that are complete or absent: written under a temporary name, then renamed. Imports no torch."""

import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file, completely or not at all, and force it to the disk.

    write: writes the content to an open file. At any moment, also after a crash, either the old file, the new
    one or none is there.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the names of a folder's files to the disk: they are the folder's content, not the files'."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole."""
    write_whole(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for a pipe or a device, which may never come to an
    end."""
    # Not waiting for a writer at the other end of a pipe.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def parse_json(content: bytes) -> Any:
    """Parse JSON. Raises ValueError, also where it is not UTF-8 or brackets are nested too deep."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def check_writable(runs: Path) -> None:
    """Make the folder of all runs where it is missing. Raises ValueError where it cannot be written to."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise ValueError(f"--runs {runs}: expected a folder to write to: {error.strerror}") from None


class RunFolderLost(OSError):  # noqa: N818  it says what happened
    """A file that a run writes to was renamed, removed or cut while it was open."""


class LineFile:
    """Appends lines to a file, each handed to the system at once: a process that dies loses none."""

    def __init__(self, path: Path, keep_waiting: bool = False) -> None:
        """keep_waiting: what a full disk does not take is kept here until the next write, instead of raising
        OSError."""
        self.path, self._keep_waiting = path, keep_waiting
        self._file = path.open("ab", buffering=0)
        self._length = os.fstat(self._file.fileno()).st_size
        self._pending = b""
        self.error: str | None = None
        """Why lines are waiting, if any are."""

    def write(self, line: str) -> None:
        """Append a line. Raises OSError, unless lines may wait."""
        self._pending += line.encode() + b"\n"
        try:
            self._write_pending()
        except OSError as error:
            if not self._keep_waiting:
                raise
            self.error = error.strerror

    def check_in_place(self) -> None:
        """Raise RunFolderLost where another file, or none, is at the path now, or this one is shorter or
        longer than what was written."""
        opened = os.fstat(self._file.fileno())
        try:
            named = self.path.stat()
        except OSError as error:
            raise RunFolderLost(
                f"{self.path}: {error.strerror}: it was removed or renamed meanwhile"
            ) from None
        if (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise RunFolderLost(f"{self.path}: it was replaced by another file meanwhile")
        if opened.st_size != self._length:
            problem = f"expected the {self._length} bytes that were written, got {opened.st_size}"
            raise RunFolderLost(f"{self.path}: {problem}: it was altered meanwhile")

    def sync(self) -> None:
        """Force all lines to the disk. Raises OSError."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Raises OSError where there is still no room for the lines that are waiting."""
        try:
            self._write_pending()
        finally:
            self._file.close()

    def _write_pending(self) -> None:
        try:
            while self._pending:  # the system may take a part of a line only
                written = self._file.write(self._pending)
                self._length += written
                self._pending = self._pending[written:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.error = None
