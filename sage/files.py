"""Files that are whole or not there: written under a temporary name, then renamed. Imports no torch."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that at any moment the old one, the new one or none is there, on the disk too."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sync_names(path.parent.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """A file's name is its folder's content, and reaches the disk with it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_writable(runs: Path) -> None:
    """Raise ValueError where no run's folder can be made in runs, which is made where it is missing."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise ValueError(f"--runs {runs}: expected a folder to write to: {error.strerror}") from None


class LineFile:
    """Whole lines, handed to the system at once: a process that dies loses none."""

    def __init__(self, path: Path, keep_waiting: bool = False) -> None:
        """Appends to the file. keep_waiting: what a full disk does not take waits here for the next write;
        else that is an OSError."""
        self.path, self._keep_waiting = path, keep_waiting
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self.trouble: str | None = None
        """Why lines wait, where they do."""

    def write(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._keep_waiting:
                raise
            self.trouble = error.strerror

    def sync(self) -> None:
        """Have all lines on the disk. Raises OSError."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raises OSError where lines still find no place."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        try:
            while self._waiting:  # what is taken of a line before the disk is full is continued later
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.trouble = None
