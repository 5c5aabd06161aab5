"""A run that is stopped and resumed has the same bits as one that is not: in threads, on the toy."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Stopped
from sage.runfolder import checkpoint, manifest
from sage.runfolder.checkpoint import Checkpoints, CheckpointWriter, read_state
from sage.runfolder.manifest import SHARED, worker_file
from sage.training.optim import OPTIMIZERS
from sage.training.settings import RunSettings
from sage.training.simulate import SimulatedStore
from sage.training.train import Trainer
from tests.cases import CASES
from tests.toy import (
    NormTask,
    ToyTask,
    bits_of,
    lines_of,
    settings_of,
    state_of,
    train,
    train_until,
    trainer_of,
)

BATCHES = {1: 12, 3: 4}
"""world size -> the batch with which an epoch has five steps."""
STOPS = [2, 7]
"""Steps in the middle of either epoch, each between two step lines: the toy writes those of steps 0, 3, 4, 6
and 9."""
TURNING = {"warmup_epochs": 1.3, "reference_batch": 3, "decay_epochs": [1.7], "decay_factor": 0.5}
"""A learning rate that changes in both epochs."""
FALLING = {"name": "schedule", "densities": [0.6, 0.3]}
NO_MOMENTUM = {"momentum": 0.0, "nesterov": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync: no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def settings_in(name: str, /, **changes: Any) -> RunSettings:
    feedback = "residual" if REDUCERS[name].takes_feedback else "none"
    return settings_of(name, **{"feedback": {"name": feedback}, "log": {"every": 3}, **changes})


RUNS = {
    **{str(case): settings_in(case.reducer, reducer=case.settings) for case in CASES},
    **{
        f"{name}, falling density": settings_in(name, reducer={"density": 0.1, **more}, scaling=FALLING)
        for name, more in {
            "topk": {},
            "global_topk": {},
            "sage": {},
            "threshold": {"threshold": "auto"},
            "random_k": {},
            "random_block": {},
        }.items()
    },
    **{
        f"{name}, by error": settings_in(
            name, reducer={"density": 0.1}, scaling={"name": "error", "share": 0.6, "highest": 1.0}
        )
        for name in ("topk", "sage")
    },
    **{
        f"{name}, momentum": settings_in(
            name,
            reducer={"density": 0.1},
            feedback={"name": "momentum", "nesterov": nesterov},
            optimizer=NO_MOMENTUM,
        )
        for name, nesterov in (("topk", True), ("sage", False), ("random_k", False))
    },
    **{
        f"{name}, fading residual": settings_in(
            name, feedback={"name": "residual", "decay": 0.9, "lr_correction": True}, schedule=TURNING
        )
        for name in ("topk", "sage", "powersgd")
    },
    "accordion, by batch": settings_in("accordion", reducer={"detector": "batch", "interval_epochs": 1}),
    "powersgd, started late": settings_in("powersgd", reducer={"start_step": 4}),
    "powersgd, alternating": settings_in("powersgd", reducer={"form": "alternating"}, schedule=TURNING),
    "sage, without feedback": settings_in("sage", feedback={"name": "none"}),
    "exact, adam": settings_in("exact", schedule=TURNING).model_copy(
        update={"optimizer": OPTIMIZERS["adam"].model_validate({"lr": 0.01})}
    ),
    "exact, published nesterov": settings_in("exact", optimizer={"nesterov_form": "published"}),
}
"""Every row of the reducers' table, and whatever else has a state."""


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    totals = {key: value for key, value in summary["totals"].items() if key != "seconds"}
    return summary | {"totals": totals}


def weights_in(state: dict[str, Any]) -> Any:
    """The bits of the weights in the state of shared.pt."""
    return bits_of(state["model"])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_in_the_middle_of_an_epoch_and_resumed_is_the_same_run(
    name: str, world_size: int, tmp_path: Path
) -> None:
    settings, batch = RUNS[name], BATCHES[world_size]
    (tmp_path / "straight").mkdir()
    straight = LocalComm.run(world_size, lambda comm: train(settings, comm, batch, tmp_path / "straight"))
    start = bits_of(ToyTask(batch, Place(0, 1)).model.state_dict())
    end = state_of(straight[0][0])["weights"]
    for stop in STOPS:
        folder = tmp_path / f"stopped in {stop}"
        LocalComm.run(
            world_size,
            lambda comm, stop=stop, folder=folder: train_until(
                stop, settings, comm, folder, batch_per_worker=batch
            ),
        )
        found = manifest.newest(folder)
        assert (found.manifest.step, found.manifest.epoch) == (stop + 1, stop // 5)
        assert [line["step"] for line in lines_of(folder)] == [0, 3, 4, 5, 6][: 1 if stop == 2 else 5]
        assert weights_in(read_state(found, SHARED)) not in (start, end)
        resumed = LocalComm.run(
            world_size,
            lambda comm, found=found: train(settings, comm, batch, found.run, keeps=True, resumed=found),
        )
        for (one, one_summary), (other, other_summary) in zip(straight, resumed, strict=True):
            assert state_of(one) == state_of(other)
            assert bits_of(one.position.state_dict()) == bits_of(other.position.state_dict())
            assert without_seconds(one_summary) == without_seconds(other_summary)
        assert lines_of(folder) == lines_of(tmp_path / "straight")


# --- when a checkpoint is written -----------------------------------------------------------------


def steps_kept(folder: Path) -> list[int]:
    return sorted(manifest.read(path.parent).manifest.step for path in manifest.manifests(folder))


def keep(folder: Path, epochs: int = 4, task: ToyTask | None = None, **checkpoints: Any) -> list[int]:
    """Train the toy on one worker, five steps an epoch; the steps of the checkpoints that are kept."""
    settings = settings_in("topk", epochs=epochs, checkpoint={"keep": 9, "every_minutes": None} | checkpoints)
    train(settings, LocalComm.alone(), 12, folder, task, keeps=True)
    return steps_kept(folder)


def test_a_checkpoint_is_written_after_each_so_many_epochs_or_never(tmp_path: Path) -> None:
    assert keep(tmp_path / "every", every_epochs=1) == [5, 10, 15, 20]
    assert keep(tmp_path / "third", every_epochs=3) == [15]
    assert keep(tmp_path / "never", every_epochs=None) == []


class SlowTask(ToyTask):
    """A step of rank 0 takes a minute; the other workers' clocks stand still."""

    def __init__(self, batch_per_worker: int, place: Place, now: list[float]) -> None:
        super().__init__(batch_per_worker, place)
        self.now = now

    def loss(self, batch: slice) -> Tensor:
        self.now[0] += 60 * (self.place.rank == 0)
        return super().loss(batch)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the checkpoint writers' clock shows, in a list so that a test can change it."""
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_is_written_when_rank_zeros_minutes_have_passed_and_changes_no_number(
    world_size: int, tmp_path: Path, now: list[float]
) -> None:
    batch, minutes = BATCHES[world_size], {"every_minutes": 2.5, "every_epochs": None, "keep": 9}
    settings = settings_in("sage", checkpoint=minutes)

    def worker(comm: LocalComm) -> Trainer:
        task = SlowTask(batch, Place(comm.rank, world_size), now)
        return train(settings, comm, batch, tmp_path / "kept", task, keeps=True)[0]

    kept = LocalComm.run(world_size, worker)
    # Steps 3, 6 and 9 are the first to end 2.5 minutes after the last checkpoint, or the start.
    assert steps_kept(tmp_path / "kept") == [3, 6, 9]
    (tmp_path / "without").mkdir()
    without = LocalComm.run(world_size, lambda comm: train(settings, comm, batch, tmp_path / "without")[0])
    assert list(map(state_of, kept)) == list(map(state_of, without))
    assert lines_of(tmp_path / "kept") == lines_of(tmp_path / "without")


def test_a_checkpoint_after_an_epoch_postpones_the_one_that_is_due_by_time(
    tmp_path: Path, now: list[float]
) -> None:
    task = SlowTask(12, Place(0, 1), now)
    # Step 3 is the first to end 2.5 minutes after the start; step 8 the first to do so after step 5.
    assert keep(tmp_path / "run", 2, task, every_minutes=2.5, every_epochs=1) == [3, 5, 8, 10]


def test_only_the_newest_are_kept_and_of_the_others_the_manifest_is_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, remove_folder = [], checkpoint.shutil.rmtree

    def rmtree(folder: Path, **how: Any) -> None:
        removed.append((folder.name, (folder / manifest.NAME).exists(), (folder / SHARED).exists()))
        remove_folder(folder, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    assert keep(tmp_path / "run", keep=2, every_epochs=1) == [15, 20]
    assert removed == [("step-00000005", False, True), ("step-00000010", False, True)]
    names = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000015", "step-00000020"]


def written(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_step_that_is_saved_twice_is_written_once(tmp_path: Path) -> None:
    store = SimulatedStore(Place(0, 1), LocalComm.alone())
    synced: list[int] = []

    def save(writer: CheckpointWriter, step: int) -> None:
        writer.save(step, 1, {"a": torch.ones(3)}, {"b": 1}, lambda: synced.append(step))

    writer = CheckpointWriter(tmp_path, {}, Checkpoints(), store)
    save(writer, 5)
    first = written(tmp_path)
    assert {Path(path).name for path in first} >= {SHARED, worker_file(0), manifest.NAME}
    save(writer, 5)
    save(
        CheckpointWriter(tmp_path, {}, Checkpoints(), store, last_step=5), 5
    )  # of a run that is resumed from it
    assert written(tmp_path) == first
    save(writer, 6)
    assert steps_kept(tmp_path) == synced == [5, 6]


def test_a_run_may_be_stopped_at_an_epochs_end_and_in_its_last_step(tmp_path: Path) -> None:
    """Between an epoch's last step and its evaluation, too."""
    settings = settings_in("sage")
    (tmp_path / "straight").mkdir()
    straight, _ = train(settings, LocalComm.alone(), 12, tmp_path / "straight")
    for stop_at, epochs in ((4, 0), (5, 1)):  # requested in step 4, and after the evaluation that follows it
        folder = tmp_path / str(stop_at)
        train_until(stop_at, settings, LocalComm.alone(), folder, batch_per_worker=12)
        found = manifest.newest(folder)
        assert (found.manifest.step, found.manifest.epoch) == (5, epochs)
        resumed, _ = train(settings, LocalComm.alone(), 12, folder, keeps=True, resumed=found)
        assert state_of(resumed) == state_of(straight)
        assert lines_of(folder) == lines_of(tmp_path / "straight")
        assert steps_kept(folder) == [5, 10]


def test_a_run_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    settings = settings_in("sage")
    (tmp_path / "straight").mkdir()
    straight = LocalComm.run(3, lambda comm: train(settings, comm, 4, tmp_path / "straight")[0])
    folder, resumed = tmp_path / "run", None
    # The stop is requested in a step, or at an epoch's end, as with the first 5; and how many steps are done.
    for stop_at, step in ((0, 1), (1, 2), (2, 3), (3, 4), (5, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        LocalComm.run(
            3,
            lambda comm, stop_at=stop_at, resumed=resumed: train_until(
                stop_at, settings, comm, folder, batch_per_worker=4, resumed=resumed
            ),
        )
        resumed = manifest.newest(folder)
        assert resumed.manifest.step == step
    last = LocalComm.run(3, lambda comm: train(settings, comm, 4, folder, keeps=True, resumed=resumed)[0])
    assert list(map(state_of, last)) == list(map(state_of, straight))
    assert lines_of(folder) == lines_of(tmp_path / "straight")


class DyingTask(ToyTask):
    """The host is lost in its seventh step."""

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[slice]:
        for number, batch in enumerate(super().train_batches(epoch, start), 5 * epoch + start):
            if number == 7:
                raise ConnectionResetError
            yield batch


def test_a_run_that_died_resumes_from_its_last_checkpoint_and_writes_every_line_once(
    tmp_path: Path,
) -> None:
    settings, folder = settings_in("sage", log={"every": 1}), tmp_path / "run"
    (tmp_path / "straight").mkdir()
    straight, _ = train(settings, LocalComm.alone(), 12, tmp_path / "straight")
    with pytest.raises(ConnectionResetError):
        train(settings, LocalComm.alone(), 12, folder, DyingTask(12, Place(0, 1)), keeps=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ep')  # as a host leaves it that is lost while it writes
    last = manifest.newest(folder)
    assert (last.manifest.step, len((folder / "metrics.jsonl").read_text().splitlines())) == (
        5,
        5 + 1 + 2 + 1,
    )
    resumed, _ = train(settings, LocalComm.alone(), 12, folder, keeps=True, resumed=last)
    assert state_of(resumed) == state_of(straight)
    assert lines_of(folder) == lines_of(tmp_path / "straight")
    # Once more, from a checkpoint that is not the last: the later ones are removed first.
    assert steps_kept(folder) == [5, 10]
    first = manifest.read(manifest.folder_of(folder, 5))
    train_until(7, settings, LocalComm.alone(), folder, batch_per_worker=12, resumed=first)
    assert steps_kept(folder) == [5, 8]
    assert lines_of(folder) == lines_of(tmp_path / "straight")[: 5 + 1 + 3]


def test_every_worker_gets_its_own_state_back_and_its_buffers(tmp_path: Path) -> None:
    settings, folder = settings_in("sage"), tmp_path / "run"

    def stopped(comm: LocalComm) -> dict[str, Any]:
        task = NormTask(4, Place(comm.rank, 3))
        with trainer_of(settings, comm, folder=folder, task=task, keeps=True, stop_at=2) as trainer:
            with pytest.raises(Stopped):
                trainer.run()
            return state_of(trainer)

    def restored(comm: LocalComm) -> dict[str, Any]:
        task, found = NormTask(4, Place(comm.rank, 3)), manifest.newest(folder)
        with trainer_of(settings, comm, folder=folder, task=task, keeps=True, resumed=found) as trainer:
            return state_of(trainer)

    states = LocalComm.run(3, stopped)
    assert LocalComm.run(3, restored) == states
    for part in ("buffers", "memory", "exchange"):  # each worker has its own
        assert len({repr(state[part]) for state in states}) == 3
