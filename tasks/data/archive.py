"""Reading archives that may come from anywhere: one member at a time, up to a size, and never a link."""

import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

CHUNK = 2**20


def copy_limited(content: IO[bytes], target: BinaryIO, max_bytes: int, name: str) -> None:
    """Copy a member. Raises ValueError, which names it, where it has more than max_bytes, whatever its header
    says; by then max_bytes at most were copied."""
    copied = 0
    while chunk := content.read(min(CHUNK, max_bytes - copied + 1)):
        copied += len(chunk)
        if copied > max_bytes:
            raise ValueError(f"{name}: expected at most {max_bytes:,} bytes, got more")
        target.write(chunk)


def read_limited(content: IO[bytes], max_bytes: int, name: str) -> bytes:
    """A member's content. Raises ValueError, which names it, where that is more than max_bytes."""
    found = content.read(max_bytes + 1)
    if len(found) > max_bytes:
        raise ValueError(f"{name}: expected at most {max_bytes:,} bytes, got more")
    return found


def from_zip(source: Path, wanted: Sequence[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the wanted files, in whichever folder of the archive they are."""
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            name = Path(member.filename).name
            if name in wanted and not member.is_dir():
                with archive.open(member) as content:
                    yield name, read_limited(content, max_bytes, f"{source}: {member.filename}")


def from_tar(source: Path, wanted: Sequence[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """The same of a tar archive. Raises ValueError where a wanted file is a link, a folder or a device."""
    with tarfile.open(source) as archive:
        for member in archive:
            name = Path(member.name).name
            if name not in wanted:
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise ValueError(
                    f"{source}: {member.name}: expected a file, got a link, a folder or a device"
                )
            yield name, read_limited(content, max_bytes, f"{source}: {member.name}")
