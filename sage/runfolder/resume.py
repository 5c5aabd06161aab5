"""Which run, and which of its checkpoints, --resume goes on with. Imports no torch."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage import yamlfile
from sage.config import flatten, one_line
from sage.runfolder.manifest import Checkpoint, manifests, newest_whole, read

MORE = ("epochs", "stop_at_score")
"""Free values by which a run may have to train longer."""
NEWEST = ""
"""What --resume without a path asks for."""


@dataclass(frozen=True)
class ResumeRequest:
    """What --resume is to go on with."""

    config: Mapping[str, Any]
    """This run's resolved configuration."""
    free: frozenset[str]
    """Its sections and values that may differ from the checkpoint's: they change no number of a step."""
    world_size: int
    may_reshard: bool


@dataclass(frozen=True)
class ResumePoint:
    """A run to go on with; without a checkpoint: it is done."""

    run: Path
    checkpoint: Checkpoint | None


def run_of(path: Path) -> Path:
    """The run's folder that --resume PATH names: itself, or that of the checkpoint it is."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def choose(path: str, place: Path, asked: ResumeRequest) -> ResumePoint | None:
    """What --resume PATH goes on with: a run's or a checkpoint's folder, or, where path is NEWEST, the newest
    run of the configuration in place; None where no run there has come to a checkpoint. Of a run the newest
    whole checkpoint counts.

    Raises ValueError, in one line, where what is named cannot be used.
    """
    named = Path(path).resolve()
    run = _newest_run(place, asked) if path == NEWEST else run_of(named)
    if run is None:
        return None
    if is_done(run):
        _check_done(run, asked)
        return ResumePoint(run, None)
    checkpoint = read(named) if named.parent.name == "checkpoints" else newest_whole(run)
    if differs := differences(checkpoint.manifest.config, asked):
        raise ValueError(f"--resume {path}: expected this configuration's, got another: {differs}")
    count = checkpoint.manifest.world_size
    if count != asked.world_size and not asked.may_reshard:
        told = (
            "each has a residual and generators of its own; resume.world_size=reshard spreads the residuals"
        )
        raise ValueError(
            f"--resume {checkpoint.folder}: expected as many workers as made it, {count}, "
            f"got {asked.world_size}: {told}"
        )
    return ResumePoint(checkpoint.run, checkpoint)


def is_done(run: Path) -> bool:
    return (run / "summary.json").exists()


def _check_done(run: Path, asked: ResumeRequest) -> None:
    """Raise ValueError where a run that is done is not what is asked for: it keeps no checkpoint to go on
    from."""
    config = _config_of(run)
    differs = differences(config, asked) or differences(config, asked, MORE)
    if differs:
        raise ValueError(f"--resume: {run} is done, and cannot be gone on with in another way: {differs}")


def _config_of(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises ValueError."""
    config = yamlfile.read(run / "config.yaml")
    return config if isinstance(config, dict) else {}


def _newest_run(place: Path, asked: ResumeRequest) -> Path | None:
    """The newest run of the configuration in place that is done or has come to a checkpoint. Raises
    ValueError where there are runs, but of other configurations alone."""
    others: list[str] = []
    for run in sorted(place.glob("*/"), key=_last_written, reverse=True):
        if not manifests(run) and not is_done(run):
            continue  # it ended before its first checkpoint
        differs = differences(_config_of(run), asked)
        if not differs:
            return run
        others.append(f"{run} is another configuration's: {differs}")
    if others:
        told = f"expected a run of this configuration with a whole checkpoint in {place}, found none"
        raise ValueError(f"--resume: {told}; the newest: {others[0]}")
    return None


def _last_written(run: Path) -> float:
    files = [*manifests(run)[:1], *run.glob("summary.json")]
    return max((file.stat().st_mtime for file in files), default=0.0)


def differences(config: Mapping[str, Any], asked: ResumeRequest, among: Collection[str] = ()) -> str:
    """What a run's configuration has otherwise, in one line; empty where it can be gone on with. among: only
    these are looked at; else all but the free ones."""
    there, here = flatten(config), flatten(dict(asked.config))
    told = [
        f"{key} is {_told(there, key)} there and {_told(here, key)} here"
        for key in _union(here, there)
        if (key in among if among else key.split(".")[0] not in asked.free)
        and _told(there, key) != _told(here, key)
    ]
    return "; ".join(told)


def _union(*mappings: Iterable[str]) -> Iterator[str]:
    yield from dict.fromkeys(key for mapping in mappings for key in mapping)


def _told(flat: Mapping[str, Any], key: str) -> str:
    return one_line(flat[key]) if key in flat else "absent"
