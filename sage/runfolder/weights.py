"""Which weights --evaluate PATH means. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from sage.runfolder.manifest import BEST, FINAL, SHARED, Checkpoint, manifests, read

EXPECTED = f"expected a run's folder, one of its checkpoints, or its {FINAL} or {BEST}"


@dataclass(frozen=True)
class SavedWeights:
    """Weights that a run has left on disk."""

    run: Path
    """The run's folder."""
    path: Path
    """What the user knows them by: their file, or a checkpoint's folder."""
    name: str
    """FINAL, BEST, or SHARED: a part of that file."""
    checkpoint: Checkpoint | None = None
    """What their file is a part of; None: it stands alone."""


def find(path: Path) -> SavedWeights:
    """The weights at a path: of a run that is done its final ones. Raises ValueError, in one line, where
    there are none."""
    if not path.exists():
        raise ValueError(f"there is no such file or folder; {EXPECTED}")
    named = path.resolve()
    if named.is_file():
        found = _of_file(named)
    elif named.parent.name == "checkpoints":
        found = SavedWeights(named.parent.parent, named, SHARED, read(named))
    else:
        found = SavedWeights(named, named / "checkpoints" / FINAL, FINAL)
    if not (found.run / "config.yaml").is_file():
        raise ValueError(f"it is not a run's: {EXPECTED}")
    if not found.path.exists():
        newest = [f"; its newest checkpoint: {path.parent}" for path in manifests(found.run)[:1]]
        raise ValueError(f"the run is not done, so it has no {FINAL}{''.join(newest)}")
    return found


def _of_file(file: Path) -> SavedWeights:
    folder = file.parent
    if file.name in (FINAL, BEST) and folder.name == "checkpoints":
        return SavedWeights(folder.parent, file, file.name)
    if file.name == BEST and folder.parent.name == "checkpoints":
        checkpoint = read(folder)
        if BEST in checkpoint.manifest.files:
            return SavedWeights(checkpoint.run, file, BEST, checkpoint)
    raise ValueError(f"it is not a run's: {EXPECTED}")
