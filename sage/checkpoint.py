"""Files that are whole or not there: written under a temporary name, then renamed."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that at any moment the old one, the new one or none is there, on the disk too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, model: torch.nn.Module) -> None:
    """The model's state_dict; torch.load(path, weights_only=True) reads it."""
    write_whole(path, lambda file: torch.save(model.state_dict(), file))


def check_writable(runs: Path) -> None:
    """Raise ValueError where no run's folder can be made in runs, which is made where it is missing."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise ValueError(f"--runs {runs}: expected a folder to write to: {error.strerror}") from None


def begin(folder: Path, config: str, environment: Mapping[str, Any]) -> None:
    """Make a run's folder, a new one, with its resolved configuration and where it runs."""
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", config)
    write_json(folder / "environment.json", environment)


def finish(folder: Path, summary: dict[str, Any], model: torch.nn.Module) -> None:
    """Write the final weights, then the summary, whose presence says that the run is done."""
    write_weights(folder / "checkpoints" / "final.pt", model)
    write_json(folder / "summary.json", summary)
