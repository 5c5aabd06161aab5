"""Where a result comes from: the commit, the versions, the machine."""

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).parent.parent.parent


def run_id(reducer: str, seed: int) -> str:
    """A name for a run: what it is, and when it started (UTC, to the millisecond).

    Of a class of the user's own, package.module:Class, the name holds the class alone.
    """
    now = datetime.now(UTC)
    return f"{reducer.rpartition(':')[2]}-s{seed}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"


def is_run_id(name: str) -> bool:
    """Whether a text can be the name of a run's folder: one component, no hidden one."""
    return re.fullmatch(r"[\w+-][\w.+-]{0,200}", name, flags=re.ASCII) is not None


def environment(**facts: Any) -> dict[str, Any]:
    """The content of environment.json, with more facts added to it."""
    commit = _git("rev-parse", "HEAD")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain")) if commit else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
        "platform": platform.platform(),
        "executable": sys.executable,
        **facts,
    }


def _git(*arguments: str) -> str | None:
    """The output of a git command, or None where this is not a checkout or git is not installed.

    Neither another repository that git's variables name, nor one that this program only lies in, counts.
    """
    here = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        done = subprocess.run(
            ["git", *here, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
