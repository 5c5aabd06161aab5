"""--evaluate scores what a run has trained; checkpoint.best keeps the best epoch's weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from sage.exchange.comm import LocalComm
from sage.interfaces import Place
from sage.runfolder import manifest
from sage.runfolder.checkpoint import read_state
from sage.runfolder.folder import finish
from sage.runfolder.manifest import BEST
from sage.training import agree
from sage.training.agree import Request
from tests.test_checkpoint import CONFIG, contents, error_line, only_run
from tests.test_launch import PATIENCE_SECONDS, ROOT
from tests.toy import ToyTask, bits_of, settings_of, train, train_until

Capture = pytest.CaptureFixture[str]
STOPPED_AFTER = 15
"""Requests: 11 steps of the first epoch, its end, and 3 of the second."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of digits in three folders: done, of one worker; simulated, of two; stopped in its second
    epoch."""
    made, calls = tmp_path_factory.mktemp("made"), []
    words = [*CONFIG, "checkpoint.best=true"]
    assert run.main([*words, "--runs", str(made / "done")]) == 0
    assert run.main([*words, "--runs", str(made / "simulated"), "--simulate", "2"]) == 0

    def ask() -> Request:
        calls.append(None)
        return Request.STOP if len(calls) >= STOPPED_AFTER else Request.NOTHING

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "requested_by_signal", ask)
        assert run.main([*words, "--runs", str(made / "stopped")]) == 0
    return made


def evaluate(path: Path, capsys: Capture, *words: str) -> dict[str, list[str]]:
    """What is printed: the words of each line by its first."""
    capsys.readouterr()
    assert run.main(["--evaluate", str(path), *words]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {first: rest for first, *rest in lines}


def summary_of(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


# --- --evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "words"), [("done", []), ("simulated", ["--simulate", "2"])])
def test_final_weights_score_what_the_summary_says_bit_for_bit_and_nothing_is_written(
    kind: str, words: list[str], made: Path, capsys: Capture
) -> None:
    folder, before = only_run(made / kind), contents(made)
    said = evaluate(folder, capsys, *words)
    summary, lines = summary_of(folder), (folder / "metrics.jsonl").read_text().splitlines()
    assert said["score"] == ["accuracy", repr(summary["score"]["last"])]
    last = json.loads(lines[-1])
    assert said["test"] == [word for name, value in last["test"].items() for word in (name, repr(value))]
    assert said["the"] == ["same", "numbers", "as", "in", "summary.json"]
    assert contents(made) == before
    assert evaluate(folder / "checkpoints" / "final.pt", capsys, *words)["score"] == said["score"]


def test_workers_that_are_processes_score_what_those_that_trained_recorded(tmp_path: Path) -> None:
    def run_two(*words: str) -> str:
        command = [sys.executable, "run.py", *words, "--workers", "2", "--runs", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_SECONDS)
        assert done.returncode == 0
        return done.stdout

    run_two(*CONFIG, "epochs=1")
    folder = only_run(tmp_path)
    lines = run_two("--evaluate", str(folder)).splitlines()
    assert summary_of(folder)["world_size"] == 2
    assert lines[-2].split() == ["score", "accuracy", repr(summary_of(folder)["score"]["last"])]
    assert lines[-1] == "the same numbers as in summary.json"


def test_other_shares_of_the_data_are_said_where_the_numbers_differ(made: Path, capsys: Capture) -> None:
    folder = only_run(made / "simulated")
    altered = summary_of(folder)
    altered["score"]["last"] += 2e-16
    copy = made.parent / "copy" / "digits" / "run"
    shutil.copytree(folder, copy)
    (copy / "summary.json").write_text(json.dumps(altered))
    said = evaluate(copy, capsys)
    assert " ".join(said["summary.json"]).endswith(
        "whose sums round otherwise: --simulate 2 divides the data as it did"
    )


def test_the_best_weights_score_the_best(made: Path, capsys: Capture) -> None:
    folder = only_run(made / "done")
    said = evaluate(folder / "checkpoints" / BEST, capsys)
    assert said["score"] == ["accuracy", repr(summary_of(folder)["score"]["best"])]


def test_a_checkpoints_weights_and_its_best_are_scored(made: Path, capsys: Capture) -> None:
    folder = only_run(made / "stopped")
    newest, oldest = (path.parent for path in manifest.manifests(folder))
    line = next(
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"epoch"' in line[:20]
    )
    at_end = evaluate(oldest, capsys)["score"]
    assert at_end == ["accuracy", repr(line["score"]["value"])]
    assert evaluate(newest / BEST, capsys)["score"] == at_end
    assert evaluate(newest, capsys)[f"{newest}:"] == ["after", "epoch", "1,", "step", "14"]


def refused(capsys: Capture, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        run.main(list(words))
    assert left.value.code == 2
    return error_line(capsys).removesuffix(" (--help explains)")


def test_what_is_not_a_runs_is_refused_in_one_line(made: Path, tmp_path: Path, capsys: Capture) -> None:
    done, stopped = only_run(made / "done"), only_run(made / "stopped")
    wanted = "expected a run's folder, one of its checkpoints, or its final.pt or best.pt"
    missing, empty = tmp_path / "missing", tmp_path
    lone = tmp_path / "final.pt"
    lone.write_bytes(b"")
    for path, why in (
        (missing, f"there is no such file or folder; {wanted}"),
        (empty, f"it is not a run's: {wanted}"),
        (lone, f"it is not a run's: {wanted}"),
        (done / "config.yaml", f"it is not a run's: {wanted}"),
        (made / "done", f"it is not a run's: {wanted}"),
    ):
        assert refused(capsys, "--evaluate", str(path)) == f"run.py: --evaluate {path}: {why}"
    newest = manifest.manifests(stopped)[0].parent
    line = refused(capsys, "--evaluate", str(stopped))
    assert line.endswith(f"the run is not done, so it has no final.pt; its newest checkpoint: {newest}")
    for words in (["--resume"], ["--dry-run"], ["--sweep", "x.yaml"], ["epochs=3"]):
        assert "--evaluate" in refused(capsys, "--evaluate", str(done), *words)


def test_damaged_weights_are_refused_before_a_worker_starts(
    made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage.workers.launch.spawn", lambda *_: pytest.fail("workers were started"))
    shutil.copytree(made / "done", tmp_path / "done")
    shutil.copytree(made / "stopped", tmp_path / "stopped")
    final = only_run(tmp_path / "done") / "checkpoints" / "final.pt"
    final.write_bytes(final.read_bytes()[:-100])
    newest = manifest.manifests(only_run(tmp_path / "stopped"))[0].parent
    best = newest / BEST
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    for path in (final, best):
        for words in ([], ["--workers", "2"]):
            assert run.main(["--evaluate", str(path), *words]) == 2
            assert error_line(capsys).startswith(f"run.py: {path}: expected ")
    # and by a run that resumes from it
    assert (
        run.main(["--resume", str(only_run(tmp_path / "stopped")), "--runs", str(tmp_path / "stopped")]) == 2
    )
    assert f"the checkpoint is damaged: {best}: expected the checksum" in error_line(capsys)


# --- the best epoch's weights ---------------------------------------------------------------------


class ScriptedTask(ToyTask):
    """Its score of each epoch is given; the least is the best."""

    scores = (5.0, 2.0, 4.0, 2.0, 3.0)
    epoch = 0

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[slice]:
        self.epoch = epoch
        return super().train_batches(epoch, start)

    def evaluate(self) -> dict[str, tuple[float, float]]:
        return {"loss": (self.scores[self.epoch], 1.0)}


class HigherTask(ScriptedTask):
    higher_is_better = True


def settings(**changes: Any) -> Any:
    return settings_of("topk", checkpoint={"best": True}, epochs=5, **changes)


@pytest.mark.parametrize(("kind", "epoch"), [(ScriptedTask, 1), (HigherTask, 0)])
def test_the_first_epoch_with_the_best_score_is_kept_and_named(
    kind: type[ScriptedTask], epoch: int, tmp_path: Path
) -> None:
    trainer, summary = train(settings(), LocalComm.alone(), task=kind(16, Place(0, 1)))
    until_then, _ = train(settings_of("topk", epochs=epoch + 1), LocalComm.alone(), 16)
    assert summary["score"]["best_epoch"] == epoch
    assert summary["score"]["best"] == kind.scores[epoch]
    assert bits_of(trainer.best_weights) == bits_of(until_then.task.model.state_dict())
    finish(tmp_path, summary, trainer.task.model, trainer.best_weights)
    saved = torch.load(tmp_path / "checkpoints" / BEST, weights_only=True)
    assert bits_of(saved) == bits_of(trainer.best_weights)


@pytest.mark.parametrize("stop_at", [2, 5, 8, 11, 18])
def test_a_run_that_is_stopped_and_resumed_keeps_the_same_best_weights(stop_at: int, tmp_path: Path) -> None:
    """Stopped in epoch 0, in epoch 1, at its end, and after it: 4 steps an epoch."""
    comm = LocalComm.alone()
    straight, summary = train(settings(), comm, task=ScriptedTask(16, Place(0, 1)))
    train_until(stop_at, settings(), comm, tmp_path, task=ScriptedTask(16, Place(0, 1)))
    found = manifest.newest(tmp_path)
    assert (BEST in found.manifest.files) == (stop_at >= 4)
    resumed, of_resumed = train(
        settings(), comm, folder=tmp_path, keeps=True, resumed=found, task=ScriptedTask(16, Place(0, 1))
    )
    assert of_resumed["score"] == summary["score"]
    assert bits_of(resumed.best_weights) == bits_of(straight.best_weights)
    assert bits_of(read_state(manifest.newest(tmp_path), BEST)) == bits_of(straight.best_weights)


def test_a_run_that_is_resumed_without_it_keeps_none_and_one_that_kept_none_cannot_begin_to(
    made: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(made / "stopped", tmp_path / "runs")
    folder = only_run(tmp_path / "runs")
    words = ["--resume", str(folder), "--runs", str(tmp_path / "runs")]
    for path in manifest.manifests(folder):
        forget_best(path)
    assert run.main(words) == 2
    newest = manifest.manifests(folder)[0].parent
    why = f"expected false, since {newest} has no weights of its best epoch so far"
    assert error_line(capsys).startswith(f"run.py: checkpoint.best: {why}")
    assert run.main([*words, "checkpoint.best=false"]) == 0
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"final.pt"}


def forget_best(path: Path) -> None:
    """Make of a checkpoint one of a run that did not keep the best weights."""
    found = manifest.read(path.parent).manifest
    files = {name: facts for name, facts in found.files.items() if name != BEST}
    path.write_text(found.model_copy(update={"files": files}).sealed().model_dump_json())
    (path.parent / BEST).unlink()
