"""Sweeps: one file (a base, a grid, seeds) as a list of points; which are done, and which are being run.
Imports no torch.

A point's runs are in <sweep>/<point>/ under the folder of runs. Both names follow from the file alone, so
that any process, and the report, finds them without a registry.
"""

import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict

from sage import locks, yamlfile
from sage.config import ConfigError, Settings, load, one_line

Block = dict[str, list[Any]]
LoadSettings = Callable[[Path, list[str]], Any]
"""Reads a configuration's file with overrides and returns its settings; raises ConfigError."""

LONGEST_NAME = 150
"""The most characters in the name of a point's folder; file systems allow 255 bytes."""


def _blocks(grid: Any) -> list[Block]:
    """The grid as a list of mappings. Raises ValueError where a value is not a list."""
    blocks = grid if isinstance(grid, list) else [grid]
    for block in blocks:
        if not isinstance(block, dict):
            raise ValueError(
                f"expected a mapping of key.path to values, or a list of such, got {one_line(block)}"
            )
        for key, values in block.items():
            if key == "seed":
                raise ValueError("seed: expected the seeds under the key seeds, not in the grid")
            if not isinstance(values, list) or not values:
                raise ValueError(f"{key}: expected a list of values, one or more, got {one_line(values)}")
    return blocks


class Sweep(Settings):
    """The content of a file in configs/sweeps."""

    base: str | None = None
    """The configuration to vary, relative to the sweep's file; null: the grid's key `base` names it."""
    grid: Annotated[list[Block], BeforeValidator(_blocks)] = [{}]
    """key.path: [values], for all combinations; the last key varies fastest. Of a list of such mappings, the
    points of one come after those of the other. The key `base` varies the configuration's file."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
    """Every combination is run with each seed. Seeds vary slowest: one added at the end moves no index."""


@dataclass(frozen=True)
class Point:
    """One configuration to run."""

    index: int
    config: Path
    overrides: list[str]
    folder: Path
    """Where its runs are, relative to the folder of all runs."""

    def __str__(self) -> str:
        return shlex.join([str(self.config), *self.overrides])


def single_point(config: Path, overrides: list[str]) -> Point:
    """A configuration that is run without a sweep. It is never done: each call is a new run. Raises
    ConfigError."""
    raw = yamlfile.read(config)
    if isinstance(raw, dict) and "seeds" in raw and "task" not in raw:
        command = f"python run.py --sweep {shlex.quote(str(config))}"
        raise ConfigError(f"{config}: this is a sweep's file, not a configuration: {command}")
    return Point(0, config, overrides, Path(config.stem))


def read(path: Path, extra: Sequence[str] = ()) -> list[Point]:
    """The points of a sweep's file, each with the overrides in extra too. Raises ConfigError.

    The points' values are not checked, since no component is known here: see resolve.
    """
    raw = yamlfile.read(path)
    if isinstance(raw, dict) and "task" in raw:
        command = f"python run.py {shlex.quote(str(path))}"
        raise ConfigError(f"{path}: this is a configuration, not a sweep's file: {command}")
    sweep = load(path, [], Sweep, {})
    texts = {id(value): one_line(value) for block in sweep.grid for of in block.values() for value in of}
    points: list[Point] = []
    for index, (values, seed) in enumerate(_combine(sweep)):
        base = values.pop("base", sweep.base)
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the path of a configuration, got {one_line(base)}")
        overrides = [*(f"{key}={texts[id(value)]}" for key, value in values.items()), f"seed={seed}"]
        config = Path(os.path.normpath(path.parent / base))
        folder = Path(path.stem, _folder_name([config.stem, *overrides]))
        points.append(Point(index, config, [*overrides, *extra], folder))
    _refuse_duplicates(path, points, [point.folder for point in points])
    return points


def _refuse_duplicates(path: Path, points: list[Point], values: list[Any]) -> None:
    """Raise ConfigError where two points have equal values, which their reprs say."""
    seen: dict[str, int] = {}
    for i, text in enumerate(map(repr, values)):
        first = seen.setdefault(text, i)
        if first < i:
            raise ConfigError(f"{path}: points {first} and {i} are the same run: {points[i]}")


def _combine(sweep: Sweep) -> Iterator[tuple[dict[str, Any], int]]:
    """The values of each point, and its seed."""
    for seed in sweep.seeds:
        for block in sweep.grid:
            for values in itertools.product(*block.values()):
                yield dict(zip(block, values, strict=True)), seed


def _folder_name(words: list[str]) -> str:
    """The words as a folder's name, so that it says what the point is. Where they are too long, or have
    characters that a name should not, a digest of them makes it unique."""
    text = ",".join(words)
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def resolve(path: Path, points: list[Point], load_settings: LoadSettings) -> list[Any]:
    """The settings of every point of a file. Raises ConfigError, also where two points are the same run."""
    resolved: list[Any] = []
    for point in points:
        try:
            resolved.append(load_settings(point.config, point.overrides))
        except ConfigError as error:
            lines = [f"{path}: point {point.index}: {line}" for line in str(error).splitlines()]
            raise ConfigError("\n".join(lines)) from None
    _refuse_duplicates(path, points, resolved)
    return resolved


def pick(points: list[Point], index: int) -> Point:
    """The point with this index. Raises ConfigError."""
    if index >= len(points):
        raise ConfigError(f"--index: expected an integer in [0, {len(points) - 1}], got {index}")
    return points[index]


def finished_run(folder: Path, settings: Any, load_settings: LoadSettings) -> Path | None:
    """The newest run in a point's folder that is done and has these settings; None: there is none."""
    for summary in sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if load_settings(summary.parent / "config.yaml", []) == settings:
                return summary.parent
        except ConfigError:  # not this point's run; one of another version, for example
            continue
    return None


def listing(points: list[Point], done: list[bool], runs: Path) -> str:
    """A line for each point: its index, whether it is done or being run in the folder runs, what it is."""
    lines = ["index  state    point"]
    for point, is_done in zip(points, done, strict=True):
        state = "done" if is_done else "running" if holder(runs / point.folder) else "waiting"
        lines.append(f"{point.index:5}  {state:7}  {point}")
    return "\n".join(lines)


# --- points that are being run --------------------------------------------------------------------

RUN_LOCK = ".run.lock"
"""A file in a point's folder that worker 0 of a run keeps locked while it runs the point."""
SWEEP_LOCK = ".sweep.lock"
"""A file there that a sweep keeps locked from before it starts a point's process until that has ended. So two
sweeps do not start the same point; without it they would find out when each process has done its imports."""


def lock(folder: Path, name: str) -> int | None:
    """locks.lock of a file in a point's folder."""
    return locks.lock(folder / name)


def holder(folder: Path, names: Sequence[str] = (RUN_LOCK, SWEEP_LOCK)) -> str:
    """Which process runs a point, in words; empty where none does, as far as the file system has locks."""
    for path in (folder / name for name in names):
        if who := locks.holder(path):
            return f"{who} ({path})"
    return ""


@contextmanager
def being_run(folder: Path | None) -> Iterator[str]:
    """Hold a point while this process runs it; None: nothing. Yields what is wrong where it cannot be held:
    another process runs the point."""
    if folder is None:
        yield ""
        return
    try:
        opened = lock(folder, RUN_LOCK)
    except OSError as error:
        yield str(error)
        return
    if opened is None:
        yield f"another process runs this point: {holder(folder, [RUN_LOCK]) or folder}"
        return
    try:
        yield ""
    finally:
        os.close(opened)
