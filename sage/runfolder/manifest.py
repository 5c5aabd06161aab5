"""Checkpoints on disk, and which one to go on from. Imports no torch.

runs/<config>/<run id>/checkpoints/step-00001234/    shared.pt  rank0.pt  rank1.pt ...  manifest.json

The manifest is written last and names every file with its size and checksum: without one there is no
checkpoint.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sage.config import Settings, flatten, one_line, read_yaml

FORMAT = 1
"""Of the files; a program reads its own alone."""
NAME = "manifest.json"
SHARED = "shared.pt"
MORE = ("epochs", "stop_at_score")
"""Free values by which a run may have to train longer."""
NEWEST = ""
"""What --resume without a path asks for."""


def own(rank: int) -> str:
    """The name of a worker's file."""
    return f"rank{rank}.pt"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


class FileFacts(Settings):
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Settings):
    """What a checkpoint says of itself."""

    format: int
    step: int = Field(ge=0)
    """Steps done."""
    epoch: int = Field(ge=0)
    """Epochs done."""
    world_size: int = Field(ge=1)
    config: dict[str, Any]
    """The run's resolved configuration."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: Manifest

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.parent.parent

    def check_whole(self, contents: bool) -> None:
        """Raise ValueError where a file is missing or has another size or, if contents are asked for (read
        them), another checksum."""
        for name, facts in self.manifest.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts.bytes:
                found = "it is missing" if size is None else f"got {size}"
                raise ValueError(f"{path}: expected {facts.bytes} bytes, as {NAME} says, {found}")
            if contents:
                self.read(name)

    def read(self, name: str) -> bytes:
        """A file's content. Raises ValueError where its checksum is not the manifest's."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.folder / name}: cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            told = "expected the checksum in its manifest, got another: the file was altered"
            raise ValueError(f"{self.folder / name}: {told}")
        return content


@dataclass(frozen=True)
class Asked:
    """What --resume is to go on with."""

    config: Mapping[str, Any]
    """This run's resolved configuration."""
    free: frozenset[str]
    """Its sections and values that may differ from the checkpoint's: they change no number of a step."""
    world_size: int
    may_reshard: bool


@dataclass(frozen=True)
class Found:
    """A run to go on with; without a checkpoint: it is done."""

    run: Path
    checkpoint: Checkpoint | None


# --- reading --------------------------------------------------------------------------------------


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises ValueError, in one line, where there is none that can be used."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: expected a checkpoint's manifest: {error.strerror}") from None
    except ValueError:  # neither JSON nor UTF-8
        raise ValueError(f"{path}: expected a checkpoint's manifest, got what is no JSON") from None
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        told = "another version of this program made it"
        raise ValueError(f"{path}: format: expected {FORMAT}, got {one_line(version)}; {told}")
    try:
        made = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for name in (SHARED, *map(own, range(made.world_size))):
        if name not in made.files:
            raise ValueError(f"{path}: files: expected {name} among them")
    return Checkpoint(folder, made)


def manifests(run: Path) -> list[Path]:
    """Those of a run, newest first."""
    return sorted((run / "checkpoints").glob(f"step-*/{NAME}"), reverse=True)


def newest_whole(run: Path) -> Checkpoint:
    """A run's newest checkpoint of which no file is missing or cut off. Raises ValueError, which says what
    is wrong with the newest, where there is none."""
    trouble: ValueError | None = None
    for path in manifests(run):
        try:
            checkpoint = read(path.parent)
            checkpoint.check_whole(contents=False)
            return checkpoint
        except ValueError as error:
            trouble = trouble or error
    told = f"--resume: expected a run's folder with a whole checkpoint, found none in {run}"
    raise ValueError(f"{told}; the newest: {trouble}" if trouble else told)


# --- choosing -------------------------------------------------------------------------------------


def run_of(path: Path) -> Path:
    """The run's folder that --resume PATH names: itself, or that of the checkpoint it is."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def choose(path: str, place: Path, asked: Asked) -> Found | None:
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
        return Found(run, None)
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
    return Found(checkpoint.run, checkpoint)


def is_done(run: Path) -> bool:
    return (run / "summary.json").exists()


def _check_done(run: Path, asked: Asked) -> None:
    """Raise ValueError where a run that is done is not what is asked for: it keeps no checkpoint to go on
    from."""
    config = _config_of(run)
    differs = differences(config, asked) or differences(config, asked, MORE)
    if differs:
        raise ValueError(f"--resume: {run} is done, and cannot be gone on with in another way: {differs}")


def _config_of(run: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises ValueError."""
    path = run / "config.yaml"
    try:
        config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ValueError(f"{path}: expected a run's configuration: {error.strerror}") from None
    return config if isinstance(config, dict) else {}


def _newest_run(place: Path, asked: Asked) -> Path | None:
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


def differences(config: Mapping[str, Any], asked: Asked, among: Collection[str] = ()) -> str:
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
