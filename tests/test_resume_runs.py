"""run.py --resume: every family of tasks, simulated workers, processes, and other numbers of workers."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from sage.runfolder import manifest
from sage.runfolder.checkpoint import read_state
from sage.runfolder.folder import REQUEUE
from sage.runfolder.manifest import SHARED, worker_file
from sage.training import agree
from sage.training.agree import Request
from sage.workers.signals import WATCH
from tests.test_launch import PATIENCE_SECONDS, command, start, wait_for_steps
from tests.test_simulate import DIGITS, DOCS, ROOT, assert_same_run, numbers, restored, simulate, weights

__all__ = ["restored"]  # a fixture that every test here gets

RATINGS = str(ROOT / "configs" / "synthetic_ratings.yaml")
SHORT = ["--threads", "1", "log.tensorboard=false", "log.every=3"]
FAMILIES = {
    # 11 steps an epoch of two workers, with BatchNorm.
    "digits": [DIGITS, "task.batch_per_worker=64", "reducer.density=0.05"],
    # 12 steps an epoch of two workers, with dropout and a hidden state.
    "python_docs": [
        *(DOCS, "task.units=8", "task.layers=2", "task.dropout=0.5", "task.train_tokens=2000"),
        *("task.batch_per_worker=8", "task.bptt=10", "reducer.density=0.05"),
    ],
    # 10 steps an epoch, with dropout and negatives that are drawn.
    "synthetic_ratings": [
        *(RATINGS, "task.global_batch=12250", "task.factors=4", "task.widths=[8, 4]", "task.dropout=0.5"),
    ],
}
Stop = Callable[[int, int], None]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """A function that makes the next runs stop in a step, given the number of simulated workers.

    An epoch's end, where the workers agree too, counts as a step; a step below 0 is never reached.
    """

    def stop_at(step: int, world_size: int) -> None:
        num_calls = 0

        def request() -> Request:
            nonlocal num_calls
            num_calls += 1
            return Request.STOP if num_calls > step * world_size >= 0 else Request.NOTHING

        monkeypatch.setattr(agree, "requested_by_signal", request)

    return stop_at


def train(runs: Path, world_size: int, *words: str) -> Path:
    """Train, with simulated workers where there are several, and without failing; the run's folder."""
    simulated = ["--simulate", str(world_size)] if world_size > 1 else []
    assert run.main([*words, *SHORT, "epochs=2", *simulated, "--runs", str(runs)]) == 0
    (folder,) = runs.glob("*/*")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    del summary["totals"]["seconds"]
    return summary


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_each_family_that_is_stopped_twice_is_the_same_run(
    family: str, world_size: int, tmp_path: Path, stop_at: Stop
) -> None:
    words = FAMILIES[family]
    straight = train(tmp_path / "straight", world_size, *words)
    steps = summary_of(straight)["steps"] // 2
    assert steps >= 10
    stop_at(4, world_size)
    folder = train(tmp_path / "stopped", world_size, *words)
    assert manifest.newest(folder).manifest.step == 5
    assert (folder / REQUEUE).exists()
    assert not (folder / "summary.json").exists()
    first = read_state(manifest.newest(folder), SHARED)["model"]
    stop_at(steps, world_size)  # of 5 fewer, and the epoch's end
    assert train(tmp_path / "stopped", world_size, *words, "--resume") == folder
    found = manifest.newest(folder).manifest
    assert (found.epoch, found.step) == (1, steps + 5)
    second = read_state(manifest.newest(folder), SHARED)["model"]
    stop_at(-1, world_size)
    train(tmp_path / "stopped", world_size, *words, "--resume", str(folder))
    assert not (folder / REQUEUE).exists()
    assert_same_run(folder, straight)
    assert summary_of(folder) == summary_of(straight)
    for before, after in ((first, second), (second, weights(folder))):
        assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    environment = json.loads((folder / "environment.json").read_text())
    assert [entry["step"] for entry in environment["resumed"]] == [5, steps + 5]


# --- another number of workers --------------------------------------------------------------------


def test_another_number_of_workers_is_refused_in_one_line_unless_it_is_allowed(
    tmp_path: Path, stop_at: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FAMILIES["digits"], *SHORT, "epochs=2", "--runs", str(tmp_path)]
    stop_at(4, 2)
    folder = train(tmp_path, 2, *FAMILIES["digits"])
    found = manifest.newest(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for resume in ([], [str(folder)], [str(found.folder)]):
        for workers, count in ((["--simulate", "3"], 3), (["--workers", "3"], 3), ([], 1)):
            assert run.main([*words, *workers, "--resume", *resume]) == 2
            said = capsys.readouterr()
            assert said.out == ""
            (line,) = said.err.splitlines()
            assert line.startswith(f"run.py: --resume {found.folder.resolve() if resume else found.folder}: ")
            assert f"expected as many workers as made it, 2, got {count}: " in line
            assert "resume.world_size=reshard" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    stop_at(-1, 3)
    train(tmp_path, 3, *FAMILIES["digits"], "resume.world_size=reshard", "--resume")
    assert "from 2 workers to 3" in capsys.readouterr().out
    summary = summary_of(folder)
    # 5 of 11 steps are 3.2 of 7, rounded up; the rest of them, and 7 more.
    assert (summary["world_size"], summary["steps"]) == (3, 5 + (7 - 4) + 7)
    steps = [line["step"] for line in numbers(folder) if line["kind"] == "step"]
    assert steps == [0, 3, 6, 7, 9, 12, 14]  # in 7 and 14 the epochs end


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "option"), [("sage", "--workers"), ("powersgd", "--workers"), ("exact", "--simulate")]
)
def test_processes_that_a_signal_stopped_and_that_resume_are_those_that_were_not_stopped(
    reducer: str, option: str, tmp_path: Path
) -> None:
    """Two processes have the bits of two simulated workers (a law of its own); so a run may change between
    them."""
    words = [DIGITS, f"reducer.name={reducer}", "task.batch_per_worker=16"]  # 44 steps an epoch
    # When the signal comes is not known in advance, so the number of epochs is set when the run is resumed.
    stopped = command(*words, *SHORT, "epochs=100000", "--workers", "2", runs=tmp_path / "stopped")
    launcher = start(stopped)
    try:
        folder = wait_for_steps(tmp_path / "stopped", 4)
        os.kill(launcher.pid, signal.SIGUSR1)
        output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert "Traceback" not in output
    found = manifest.newest(folder)
    assert f"stopped by a signal after step {found.manifest.step}; to resume: --resume {folder}" in output
    assert (folder / REQUEUE).exists()
    assert set(found.manifest.files) == {SHARED, worker_file(0), worker_file(1)}
    words += [*SHORT, f"epochs={found.manifest.epoch + 1}"]
    resumed = start(command(*words, option, "2", "--resume", runs=tmp_path / "stopped"))
    output, _ = resumed.communicate(timeout=PATIENCE_SECONDS)
    assert resumed.returncode == 0, output
    assert f"resumed after epoch {found.manifest.epoch}, step {found.manifest.step}" in output
    assert not (folder / REQUEUE).exists()
    straight = simulate(tmp_path / "straight", 2, *words)
    assert_same_run(folder, straight)
    totals = [summary_of(path) | {"simulated": None} for path in (folder, straight)]
    assert totals[0] == totals[1]


def test_no_signal_was_left_behind() -> None:
    assert WATCH.received is None
