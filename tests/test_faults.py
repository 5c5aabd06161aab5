"""A run with faults ends like the undisturbed run; and the campaign notices one that does not."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.disturb import VARIANTS, Fault, Trial
from tests.faults import campaign, draw, table
from tests.victim import count_steps, difference, differing_bits, lines_of, saved_steps, steps_of, why_no_disk

CHAIN = (
    Fault("kill", "one worker", after=60, rank=0),
    Fault("hang", "one worker", after=60, rank=1),
    Fault("signal", "SIGUSR1 to one", after=60, rank=1),
    Fault("cut write", "at a temporary file", after=60),
)
STARVED = (Fault("full disk", "required", after=60), Fault("full disk", "room again", after=60))


@pytest.fixture(scope="module")
def no_disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return why_no_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def trial(place: Path, no_disk: str) -> Trial:
    """One run with all the faults, one after the other: the launch after each takes most of the time."""
    (trial,) = campaign([CHAIN if no_disk else CHAIN + STARVED], place, jobs=2)
    return trial


def test_a_run_that_is_killed_frozen_stopped_and_cut_off_ends_like_the_undisturbed_run(trial: Trial) -> None:
    assert trial.failures == []
    assert trial.bits == 0
    assert len(trial.lost) == len(trial.faults)
    assert trial.lost[2] == 0  # a signal with time left loses nothing


def test_a_run_whose_disk_is_full_keeps_its_checkpoint_and_can_be_resumed(trial: Trial, no_disk: str) -> None:
    if no_disk:
        pytest.skip(f"no small file system could be mounted: {no_disk}")
    assert [fault.variant for fault in trial.faults[4:]] == ["required", "room again"]
    assert trial.failures == []
    assert all(lost <= since for lost, since in zip(trial.lost[4:], trial.since[4:], strict=True))
    assert len(trial.lost) == len(trial.faults)


# --- what the campaign notices --------------------------------------------------------------------


@pytest.fixture
def copies(trial: Trial, place: Path, tmp_path: Path) -> Sequence[Path]:
    """Two copies of the undisturbed run."""
    (run,) = (path.parent for path in place.glob("undisturbed/digits/*/summary.json"))
    return [shutil.copytree(run, tmp_path / name) for name in ("one", "other")]


def test_one_differing_bit_of_a_weight_is_noticed(copies: Sequence[Path]) -> None:
    one, other = copies
    assert difference(one, other) == ""
    path = one / "checkpoints" / "final.pt"
    weights = torch.load(path, weights_only=True)
    next(iter(weights.values())).view(-1)[0:1].view(torch.int32).bitwise_xor_(1)
    torch.save(weights, path)
    assert differing_bits(path, other / "checkpoints" / "final.pt") == 1
    assert difference(one, other).startswith("checkpoints/final.pt: 1 bits differ")


@pytest.mark.parametrize(("old", "new"), [('"loss": ', '"loss": 1'), ('"step": 3,', '"step": 2,')])
def test_a_line_that_differs_is_noticed(copies: Sequence[Path], old: str, new: str) -> None:
    metrics = copies[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(old, new, 1))
    assert difference(*copies).startswith("metrics.jsonl: ")


def test_an_extra_line_and_a_file_that_was_not_removed_are_noticed(copies: Sequence[Path]) -> None:
    one, other = copies
    (one / "requeue").touch()
    assert difference(one, other).startswith("files: ")
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    assert "metrics.jsonl: " in difference(one, other)


def checkpoint_of(run: Path, step: int) -> Path:
    """Write a checkpoint whose files are a few bytes."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    sums = {
        "shared.pt": "6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090",  # of abc123
        "rank0.pt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of abc
        "rank1.pt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    for name in sums:
        (folder / name).write_text("abc123" if name == "shared.pt" else "abc")
    manifest = {"step": step, "files": {name: {"sha256": value} for name, value in sums.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_checkpoint_is_whole_with_its_manifest_and_every_byte(tmp_path: Path) -> None:
    assert saved_steps(tmp_path) == 0
    checkpoint_of(tmp_path, 5)
    newest = checkpoint_of(tmp_path, 9)
    assert saved_steps(tmp_path) == 9
    (newest / "rank1.pt").write_text("abd")
    assert saved_steps(tmp_path) == 5
    (newest / "rank1.pt").write_text("abc")
    (newest / "manifest.json").unlink()
    assert saved_steps(tmp_path) == 5


def test_an_incomplete_line_does_not_count_as_a_step(tmp_path: Path) -> None:
    line = '{"kind": "step", "step": %d, "seconds": {"data": 1.0}}'
    (tmp_path / "metrics.jsonl").write_text(line % 0 + "\n" + line % 1 + "\n" + (line % 2)[:-9])
    assert steps_of(tmp_path) == [0, 1]
    assert count_steps(tmp_path) == 2
    assert lines_of(tmp_path)[1] == {"kind": "step", "step": 1}


def test_the_seed_determines_the_faults_and_every_variant_has_its_turn() -> None:
    kinds = list(VARIANTS)
    drawn = [draw(1, number, kinds, 300) for number in range(30)]
    assert drawn == [draw(1, number, kinds, 300) for number in range(30)]
    assert drawn != [draw(2, number, kinds, 300) for number in range(30)]
    assert {(f.kind, f.variant) for f in drawn} == {(kind, v) for kind in kinds for v in VARIANTS[kind]}
    assert {fault.rank for fault in drawn} == {0, 1}
    assert all(1 <= fault.after <= 300 for fault in drawn)


def test_the_table_counts_what_survived_and_what_was_lost() -> None:
    fault = draw(1, 0, ["kill"], 300)
    good = Trial([fault], lost=[3], since=[4], seconds=10.0)
    bad = Trial([fault], failures=["a step twice"], lost=[6], since=[5], restarts=1, bits=2, seconds=20.0)
    header, row = table([good, bad]).splitlines()
    assert header.split()[:2] == ["kind", "trials"]
    assert row.split() == ["kill", "2", "1", "1", "0", "4.5", "6", "5", "2", "15"]
    assert asdict(bad)["failures"] == ["a step twice"]
