"""Published files from the internet, each complete and verified, from the first place that has them."""

import shutil
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

TIMEOUT_SECONDS = 30
Places = tuple[tuple[str, ...], ...]
"""The official place, then its mirrors; a place is the URLs of one file or of several."""


def fetch_first(name: str, places: Places, folder: Path, verify: Callable[[Path], None]) -> list[Path]:
    """The files of the first place that has them all, in a folder.

    verify raises ValueError where a file is not the published one. Raises ValueError, in one line with each
    place's reason, where no place has them.
    """
    reasons = []
    for place in places:
        try:
            files = [_fetch(url, folder) for url in place]
            for file in files:
                verify(file)
            return files
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{place[0]}: {error}")
    raise ValueError(f"{name} cannot be downloaded; fetch it elsewhere and use --from ({'; '.join(reasons)})")


def _fetch(url: str, folder: Path) -> Path:
    """Download one file, with a progress bar. Raises OSError where that fails or stops early."""
    import rich.console  # here: every run imports this module
    import rich.progress

    file = folder / url.rpartition("/")[2]
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, file.open("wb") as target:
        size = int(answer.headers.get("Content-Length", 0))
        console = rich.console.Console(stderr=True)
        with rich.progress.wrap_file(answer, size, description=file.name, console=console) as shown:
            shutil.copyfileobj(shown, target)
    if size and file.stat().st_size != size:
        raise OSError(f"the download ended after {file.stat().st_size} of {size} bytes")
    return file
