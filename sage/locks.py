"""Files that one process keeps locked while it works on something. Imports no torch.

The system gives a lock back when its process ends, however it ends. A file and not a folder is locked: on NFS
a lock is seen by other hosts only where the file is open for writing.
"""

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 1.0
"""How long a process tries to lock a file. One that asks who holds a lock holds it itself for a moment."""
POLL_SECONDS = 0.02
"""How often it tries."""


def lock(path: Path, seconds: float = SECONDS) -> int | None:
    """Lock a file, which is made, as is its folder; None: for so many seconds another process has it locked.

    Returns a file descriptor, and closing it gives the lock back. Where the file system has no locks, nothing
    is locked and nobody is kept out. Raises OSError where the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + seconds
    while not _try_lock(opened, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            os.close(opened)
            return None
        time.sleep(POLL_SECONDS)
    with suppress(OSError):  # on a full disk nobody learns who it is
        os.ftruncate(opened, 0)
        os.write(opened, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return opened


def holder(path: Path) -> str:
    """Which process has locked a file, in words; empty where none has, as far as the file system has
    locks."""
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError:  # there is no such file, or it is another user's
        return ""
    try:
        if _try_lock(opened, fcntl.LOCK_SH):
            return ""
        return os.read(opened, 200).decode(errors="replace") or "another process"
    finally:
        os.close(opened)


def _try_lock(opened: int, kind: int) -> bool:
    """Whether no other process keeps this one from locking the file."""
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True
