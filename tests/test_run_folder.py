"""A run's folder that is renamed, removed or cut while it trains, and what --resume makes of folders and
runs."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import run
from sage.console import describe_gap
from sage.files import LineFile, RunFolderLost
from sage.runfolder import folder as run_folder
from sage.training.train import Trainer
from tests.test_checkpoint import CONFIG, contents, error_line, only_run, resume, runs, stopped

__all__ = ["runs", "stopped"]  # fixtures
Capture = pytest.CaptureFixture[str]


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def replace(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def remove_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def cut_metrics(folder: Path) -> None:
    os.truncate(folder / "metrics.jsonl", 10)


DISTURBANCES = {
    "renamed": (rename, r"metrics\.jsonl: No such file or directory: it was removed or renamed meanwhile"),
    "removed": (remove, r"metrics\.jsonl: No such file or directory: it was removed or renamed meanwhile"),
    "replaced": (replace, r"metrics\.jsonl: it was replaced by another file meanwhile"),
    "metrics removed": (remove_metrics, r"metrics\.jsonl: No such file or directory"),
    "metrics cut": (cut_metrics, r"metrics\.jsonl: expected the \d+ bytes that were written, got \d+"),
}


@pytest.mark.parametrize("when", ["before a checkpoint", "in the last epoch"])
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("name", DISTURBANCES)
def test_what_happens_to_the_folder_is_noticed_and_nothing_is_made_anew(
    name: str,
    required: bool,
    when: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    disturb, expected = DISTURBANCES[name]
    step_at = 3 if when == "before a checkpoint" else 14
    after: list[dict[Path, bytes]] = []
    step = Trainer.apply

    def apply(self: Trainer, lr_factor: float) -> None:
        step(self, lr_factor)
        if self.position.step == step_at:
            disturb(only_run(tmp_path))
            after.append(contents(tmp_path))

    monkeypatch.setattr(Trainer, "apply", apply)
    words = [f"checkpoint.required={str(required).lower()}", "checkpoint.every_epochs=1"]
    if when == "in the last epoch":
        words = ["checkpoint.every_epochs=null"]
    assert run.main([*CONFIG, *words, "--runs", str(tmp_path)]) == 1
    assert re.search(expected, error_line(capsys))
    made = set(contents(tmp_path)) - set(after[0])
    assert not made, made


def test_a_line_file_in_place_is_in_place(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("old\n")
    lines = LineFile(path)
    lines.write("new")
    lines.check_in_place()
    with path.open("a") as other:
        other.write("x")
    with pytest.raises(RunFolderLost, match="expected the 8 bytes that were written, got 9"):
        lines.check_in_place()
    lines.close()


# --- what --resume finds --------------------------------------------------------------------------


def test_metrics_that_lack_an_epoch_are_said_and_marked_in_the_report(runs: Path, capsys: Capture) -> None:
    path = only_run(runs) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["kind"] == "step"))
    assert resume(runs) == 0
    said = capsys.readouterr().out
    assert f"{path}: epoch 1 has no line: they are missing from what the report says of this run" in said
    from sage.report import __main__ as report

    assert report.main([str(runs)]) == 0
    assert f"{path}: epoch 1 has no line" in capsys.readouterr().out


def test_metrics_that_are_gone_are_said(runs: Path, capsys: Capture) -> None:
    path = only_run(runs) / "metrics.jsonl"
    path.unlink()
    assert resume(runs) == 0
    assert f"{path}: epoch 1 has no line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "count", "words"),
    [
        ({0, 1, 2}, 3, ""),
        ({0, 2}, 3, "epoch 2 has no line"),
        (set(), 3, "epochs 1, 2, 3 have no line"),
        (set(), 12, "epochs 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ... have no line"),
    ],
)
def test_a_gap_in_words(found: set[int], count: int, words: str) -> None:
    assert describe_gap(found, count) == words


def test_without_a_path_the_newest_unfinished_run_is_resumed(runs: Path, capsys: Capture) -> None:
    """A run was stopped, and a later one of the same configuration, but shorter, is done."""
    unfinished = only_run(runs)
    assert run.main([*CONFIG, "epochs=1", "--runs", str(runs)]) == 0
    capsys.readouterr()
    assert resume(runs) == 0
    said = capsys.readouterr().out
    assert "resumed after epoch 1, step 14" in said
    assert (unfinished / "summary.json").exists()


def test_a_run_that_is_being_trained_is_refused_before_workers_start(
    runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("sage.workers.launch.spawn", lambda *given: started.append(given) or 0)
    with run_folder.lock(only_run(runs)):
        for words in ([], ["--workers", "1"]):
            assert resume(runs, *words) == 2
            assert error_line(capsys).endswith(" is training this run")
    assert started == []


def test_of_another_tasks_run_at_most_ten_differences_are_listed_one_a_line(
    runs: Path, capsys: Capture
) -> None:
    words = ["configs/python_docs.yaml", "--runs", str(runs), "--resume", str(only_run(runs))]
    assert run.main(words) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.endswith("expected this configuration's run, got another:")
    assert len(lines) == 11
    assert all(re.match(r"run\.py:   \S+ is .* there and .* here$", line) for line in lines[:10])
    assert re.match(r"run\.py:   \.\.\. and \d+ more$", lines[10])


def test_a_folder_of_runs_is_called_one(runs: Path, capsys: Capture) -> None:
    place = only_run(runs).parent
    words = [*CONFIG, "--runs", str(runs), "--resume", str(place)]
    assert run.main(words) == 2
    line = error_line(capsys)
    assert f"--resume {place}: expected a run's folder, got one that holds 1 of them; the newest: " in line
    assert line.endswith(f"--resume {only_run(runs)}")
