"""Sweeps: one file (a base, a grid, seeds) as a list of points, and which of them are done. Imports no torch.

A point's runs lie in <sweep>/<point>/ of the folder of runs, and both names follow from the file alone: so
any process, and the report, finds them without a registry.
"""

import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict

from sage.config import ConfigError, Settings, load, one_line

Block = dict[str, list[Any]]
Resolve = Callable[[Path, list[str]], Any]
"""The settings of a configuration's file with overrides; raises ConfigError."""

LONGEST_NAME = 150
"""Of a point's folder; file systems allow 255 bytes."""


def _blocks(grid: Any) -> list[Block]:
    """A grid is one mapping, or a list of them."""
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
    """What a file in configs/sweeps says."""

    base: str | None = None
    """The configuration to vary, relative to the sweep's file; null: the grid's axis `base` names it."""
    grid: Annotated[list[Block], BeforeValidator(_blocks)] = [{}]
    """key.path -> its values: all combinations, the last key's values fastest. A list of such mappings is
    their points one after the other. The key `base` varies the configuration's file."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
    """Every combination is run with each; the slowest, so that a seed added at the end moves no index."""


@dataclass(frozen=True)
class Point:
    """One configuration to run. place: where its runs lie, under the folder of runs."""

    index: int
    config: Path
    overrides: list[str]
    place: Path

    def __str__(self) -> str:
        return shlex.join([str(self.config), *self.overrides])


def alone(config: Path, overrides: list[str]) -> Point:
    """What is run without a sweep; it is never done, each call is a new run."""
    return Point(0, config, overrides, Path(config.stem))


def read(path: Path, extra: Sequence[str] = ()) -> list[Point]:
    """The points of a sweep's file; extra: overrides of them all. Raises ConfigError.

    No component is known here, so that a point's values are not checked: see resolve.
    """
    sweep = load(path, [], Sweep, {})
    points: list[Point] = []
    for index, (values, seed) in enumerate(_combine(sweep)):
        base = values.pop("base", sweep.base)
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the path of a configuration, got {one_line(base)}")
        overrides = [f"{key}={one_line(value)}" for key, value in {**values, "seed": seed}.items()]
        config = Path(os.path.normpath(path.parent / base))
        place = Path(path.stem, _name([config.stem, *overrides]))
        points.append(Point(index, config, [*overrides, *extra], place))
    _refuse_equals(path, points, [point.place for point in points])
    return points


def _refuse_equals(path: Path, points: list[Point], values: list[Any]) -> None:
    """Raise ConfigError where two points have the same value."""
    for i, value in enumerate(values):
        first = values.index(value)
        if first < i:
            raise ConfigError(f"{path}: points {first} and {i} are the same run: {points[i]}")


def _combine(sweep: Sweep) -> Iterator[tuple[dict[str, Any], int]]:
    for seed in sweep.seeds:
        for block in sweep.grid:
            for values in itertools.product(*block.values()):
                yield dict(zip(block, values, strict=True)), seed


def _name(words: list[str]) -> str:
    """A folder's name that says what the point is; where that cannot be one as it is, with a digest."""
    text = ",".join(words)
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def resolve(path: Path, points: list[Point], settle: Resolve) -> list[Any]:
    """The settings of every point of a file. Raises ConfigError, also where two points come to one run."""
    resolved: list[Any] = []
    for point in points:
        try:
            resolved.append(settle(point.config, point.overrides))
        except ConfigError as error:
            lines = [f"{path}: point {point.index}: {line}" for line in str(error).splitlines()]
            raise ConfigError("\n".join(lines)) from None
    _refuse_equals(path, points, resolved)
    return resolved


def pick(points: list[Point], index: int) -> Point:
    if index >= len(points):
        raise ConfigError(f"--index: expected an integer in [0, {len(points) - 1}], got {index}")
    return points[index]


def finished_run(folder: Path, settings: Any, settle: Resolve) -> Path | None:
    """The newest run in a point's folder that is done and had these settings."""
    for summary in sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if settle(summary.parent / "config.yaml", []) == settings:
                return summary.parent
        except ConfigError:  # of another version, say: not this point
            continue
    return None


def listing(points: list[Point], done: list[bool]) -> str:
    """A line a point: its index, whether it is done, what it is."""
    pairs = zip(points, done, strict=True)
    lines = [f"{point.index:5}  {'yes' if is_done else 'no':4}  {point}" for point, is_done in pairs]
    return "\n".join(["index  done  point", *lines])
