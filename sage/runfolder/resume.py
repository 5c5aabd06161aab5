"""Which run, and which of its checkpoints, --resume PATH means. Imports no torch."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage import yamlfile
from sage.config import flatten, one_line
from sage.runfolder.manifest import Checkpoint, manifests, newest, read

NEWEST = ""
"""What --resume without a path asks for."""
MOST_DIFFERENCES = 10
"""Lines about values that differ; the others are counted."""
TRAINING_LENGTH = ("epochs", "stop_at_score")
"""Values that a run may change while it is not done, but which would make a finished run train longer."""


@dataclass(frozen=True)
class ResumeRequest:
    """The run that --resume is to continue."""

    config: Mapping[str, Any]
    """This run's resolved configuration."""
    free: frozenset[str]
    """Its sections and values that may differ from the checkpoint's: they change no number of a step."""
    world_size: int
    may_reshard: bool
    """Whether the checkpoint may be of another number of workers."""


@dataclass(frozen=True)
class ResumePoint:
    """A run and the checkpoint to resume it from; None: the run is done."""

    run: Path
    checkpoint: Checkpoint | None


def run_of(path: Path) -> Path:
    """The run's folder that --resume PATH names: path itself or, of a checkpoint, the run it belongs to."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def choose(path: str, runs: Path, request: ResumeRequest) -> ResumePoint | None:
    """Find what --resume PATH means; None where no run has written a checkpoint yet.

    path: a run's folder, of which the newest whole checkpoint is taken; a checkpoint's folder; or NEWEST, for
    the newest run of this configuration in the folder runs. Raises ValueError, in one line, where what it
    names cannot be resumed.
    """
    named = Path(path).resolve()
    run = _newest_run(runs, request) if path == NEWEST else run_of(named)
    if run is None:
        return None
    if is_done(run):
        _check_done(run, request)
        return ResumePoint(run, None)

    _check_is_run(run)
    checkpoint = read(named) if named.parent.name == "checkpoints" else newest(run)
    if found := differences(checkpoint.manifest.config, request):
        raise ValueError(
            f"--resume {path}: expected this configuration's run, got another:{_as_lines(found)}"
        )
    _check_world_size(checkpoint, request)
    return ResumePoint(checkpoint.run, checkpoint)


def _check_is_run(run: Path) -> None:
    """Raise ValueError where a folder is not a run's but holds some."""
    inside = sorted(run.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if inside and not (run / "config.yaml").exists():
        newest_run = shlex.quote(str(inside[-1].parent))
        problem = f"expected a run's folder, got one that holds {len(inside)} of them"
        raise ValueError(f"--resume {run}: {problem}; the newest: --resume {newest_run}")


def is_done(run: Path) -> bool:
    """Whether a run has trained to its end."""
    return (run / "summary.json").exists()


def _check_done(run: Path, request: ResumeRequest) -> None:
    """Raise ValueError where a run that is done is not the one that is requested: it has no checkpoint left
    from which it could train longer, or differently."""
    config = _config_of(run)
    found = differences(config, request)
    found = found or _differences(config, request, lambda key: key in TRAINING_LENGTH)
    if found:
        raise ValueError(
            f"--resume: {run} is done, and cannot be resumed with other settings:{_as_lines(found)}"
        )


def _check_world_size(checkpoint: Checkpoint, request: ResumeRequest) -> None:
    """Raise ValueError where a checkpoint is of another number of workers, and that is not allowed."""
    count = checkpoint.manifest.world_size
    if count != request.world_size and not request.may_reshard:
        reason = (
            "each has a residual and generators of its own; resume.world_size=reshard spreads the residuals"
        )
        raise ValueError(
            f"--resume {checkpoint.folder}: expected as many workers as made it, {count}, "
            f"got {request.world_size}: {reason}"
        )


def _config_of(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises ValueError."""
    config = yamlfile.read(run / "config.yaml")
    return config if isinstance(config, dict) else {}


def _newest_run(runs: Path, request: ResumeRequest) -> Path | None:
    """Of the runs of the requested configuration the newest that is not done and has a checkpoint, or else
    the newest that is done; None where there is no run. Raises ValueError where there are only runs of other
    configurations."""
    others: list[str] = []
    done: Path | None = None
    for run in sorted(runs.glob("*/"), key=_last_written, reverse=True):
        if not manifests(run) and not is_done(run):
            continue  # it ended before its first checkpoint
        found = differences(_config_of(run), request)
        if found:
            others.append(f"{run} is another configuration's:{_as_lines(found)}")
        elif not is_done(run):
            return run
        else:
            done = done or run
    if done is None and others:
        problem = f"expected a run of this configuration with a whole checkpoint in {runs}, found none"
        raise ValueError(f"--resume: {problem}; the newest: {others[0]}")
    return done


def _last_written(run: Path) -> float:
    """When a run wrote its newest checkpoint or its summary, in seconds; 0 where it wrote neither."""
    files = [*manifests(run)[:1], *run.glob("summary.json")]
    return max((file.stat().st_mtime for file in files), default=0.0)


def differences(config: Mapping[str, Any], request: ResumeRequest) -> list[str]:
    """How a run's configuration differs from the requested one, but for the free values, a text for each
    value."""
    return _differences(config, request, lambda key: key.split(".")[0] not in request.free)


def _differences(
    config: Mapping[str, Any], request: ResumeRequest, is_compared: Callable[[str], bool]
) -> list[str]:
    """is_compared: says of a value's key.path whether it counts."""
    there, here = flatten(config), flatten(dict(request.config))
    keys = filter(is_compared, dict.fromkeys([*here, *there]))  # each once, in order
    return [
        f"{key} is {_shown(there, key)} there and {_shown(here, key)} here"
        for key in keys
        if _shown(there, key) != _shown(here, key)
    ]


def _as_lines(found: list[str]) -> str:
    """The first differences: a single one behind the text, several in lines of their own."""
    if len(found) == 1:
        return f" {found[0]}"
    rest = [f"... and {len(found) - MOST_DIFFERENCES} more"] if len(found) > MOST_DIFFERENCES else []
    return "".join(f"\n  {line}" for line in [*found[:MOST_DIFFERENCES], *rest])


def _shown(flat: Mapping[str, Any], key: str) -> str:
    """A value as YAML writes it, or that it is absent."""
    return one_line(flat[key]) if key in flat else "absent"
