"""A run that reads the device's numbers late, as on a GPU: the same numbers, and no bad step gets past."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, TrainingError
from sage.runfolder import manifest
from sage.training.agree import Request
from sage.training.settings import RunSettings
from sage.training.train import Trainer
from tests.test_skip import Spoil, loss_becomes_nan, one_gradient_becomes_infinite, spoil_steps
from tests.toy import ToyTask, lines_of, settings_of, state_of, train, train_until, trainer_of

WORLD_SIZE, STEPS = 2, 8
"""Of the toy with a batch of 4."""
NORMS = ("gradient_norm", "residual_norm", "compression_error")


class BranchTask(ToyTask):
    """Worker r uses the r-th of its branches, worker 1 in even steps only; nobody uses the last branch."""

    def __init__(self, batch_per_worker: int, place: Place) -> None:
        super().__init__(batch_per_worker, place)
        rng = torch.Generator().manual_seed(1)
        branches = [nn.Linear(6, 2, bias=False) for _ in range(place.world_size + 1)]
        for branch in branches:
            branch.weight.data = torch.randn(2, 6, generator=rng) / 3
        self.model.extend(branches)  # type: ignore[operator]

    def loss(self, batch: slice) -> Tensor:
        trunk, branches = self.model[:3], self.model[3:]  # type: ignore[index]
        outputs, rank = trunk(self.x[batch]), self.place.rank
        if rank == 0 or batch.start // (4 * self.place.world_size) % 2 == 0:
            outputs = outputs + branches[rank](self.x[batch])
        return (outputs - self.y[batch]).square().mean()

    def evaluate(self) -> dict[str, tuple[float, float]]:
        return {"loss": (1.0, 1.0)}


def run(
    settings: RunSettings, folder: Path, reads_late: bool, kind: type[ToyTask] = ToyTask
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step and epoch lines without the norms, and the states after the last step, by rank."""
    folder.mkdir()

    def worker(comm: LocalComm) -> dict[str, Any]:
        task = kind(4, Place(comm.rank, comm.world_size))
        return state_of(train(settings, comm, folder=folder, task=task, reads_late=reads_late)[0])

    states = LocalComm.run(WORLD_SIZE, worker)
    lines = [{name: line[name] for name in line if name not in NORMS} for line in lines_of(folder)]
    return lines, states


def feedback_of(name: str) -> dict[str, str]:
    return {"name": "residual" if REDUCERS[name].takes_feedback else "none"}


@pytest.mark.parametrize("kind", [ToyTask, BranchTask])
@pytest.mark.parametrize("name", REDUCERS)
def test_reading_late_changes_no_bit(name: str, kind: type[ToyTask], tmp_path: Path) -> None:
    settings = settings_of(name, feedback=feedback_of(name), log={"every": 3}, clip={"norm": 0.5})
    at_once = run(settings, tmp_path / "at once", False, kind)
    late = run(settings, tmp_path / "late", True, kind)
    assert late == at_once
    states = late[1]
    assert states[0]["weights"] == states[1]["weights"]
    if kind is BranchTask:  # the last branch has neither moved nor decayed
        last = list(BranchTask(4, Place(0, WORLD_SIZE)).model.parameters())[-1]
        assert torch.equal(last, torch.tensor(weights_of(states[0], "5.weight")).view(2, 6))


def weights_of(state: dict[str, Any], name: str) -> list[float]:
    _, shape, content = state["weights"][name]
    assert shape == (2, 6)
    return torch.frombuffer(bytearray(content), dtype=torch.float32).tolist()


def test_the_norms_are_those_of_a_run_that_reads_at_once(tmp_path: Path) -> None:
    lines, settings = [], settings_of("topk", reducer={"density": 0.1})
    for reads_late in (False, True):
        folder = tmp_path / str(reads_late)
        folder.mkdir()
        LocalComm.run(
            2, lambda comm, late=reads_late, at=folder: train(settings, comm, folder=at, reads_late=late)
        )
        lines.append([line for line in lines_of(folder) if line["kind"] == "step"])
    assert len(lines[0]) == 2 * STEPS
    for now, late in zip(*lines, strict=True):
        for name in NORMS:
            # A float32 sum of 146 squares, and its root, against float64: 147 * 2^-24 each; the square of a
            # quotient of two has four of them.
            assert late[name] == pytest.approx(now[name], rel=4 * 147 * 2**-24)


# --- a step that is not finite --------------------------------------------------------------------


class WatchedTask(ToyTask):
    """Notes how many steps it had computed at each evaluation."""

    def __init__(self, place: Place) -> None:
        super().__init__(4, place)
        self.steps, self.evaluated_after = 0, list[int]()

    def loss(self, batch: slice) -> Tensor:
        self.steps += 1
        return super().loss(batch)

    def evaluate(self) -> dict[str, tuple[float, float]]:
        self.evaluated_after.append(self.steps)
        return super().evaluate()


def failures(
    settings: RunSettings, folder: Path, bad: int, spoil: Spoil, wanted: Request, wanted_at: int
) -> tuple[list[str], list[WatchedTask]]:
    """What every worker says, and its task, where worker 1's step `bad` is spoiled; rank 0 wants something in
    a step."""
    tasks = [WatchedTask(Place(rank, WORLD_SIZE)) for rank in range(WORLD_SIZE)]
    spoil_steps(tasks[1], {bad}, spoil)

    def worker(comm: LocalComm) -> str:
        task = tasks[comm.rank]
        with trainer_of(settings, comm, folder=folder, task=task, keeps=True, reads_late=True) as trainer:
            if comm.rank == 0:
                wants = lambda: wanted if trainer.position.step == wanted_at else Request.NOTHING  # noqa: E731
                trainer.agreement.requested = wants
            with pytest.raises(TrainingError) as error:
                trainer.run()
            return str(error.value)

    return LocalComm.run(WORLD_SIZE, worker), tasks


@pytest.mark.parametrize("wanted", [Request.NOTHING, Request.SAVE, Request.STOP])
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("bad", [0, 3, 7, 12, 15])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (loss_becomes_nan, "the loss became nan"),
        (one_gradient_becomes_infinite, "the largest magnitude of the gradient of 2.weight became inf"),
    ],
)
def test_a_bad_step_is_named_and_nothing_of_it_is_written_or_scored(
    spoil: Spoil, what: str, bad: int, every: int, wanted: Request, tmp_path: Path
) -> None:
    settings = settings_of("topk", log={"every": every})
    said, tasks = failures(settings, tmp_path / "run", bad, spoil, wanted, wanted_at=bad)
    assert said == [f"{what} on rank 1 at epoch {bad // STEPS}, step {bad}"] * WORLD_SIZE
    for task in tasks:
        assert task.steps <= bad + 2  # one more at most
        assert task.evaluated_after == [STEPS] * (bad // STEPS)
    lines = [line for line in lines_of(tmp_path / "run") if line["kind"] == "step"]
    assert all(line["step"] < bad for line in lines)
    if every == 1:
        assert [line["step"] for line in lines] == list(range(bad))
    written = [path for path in (tmp_path / "run" / "checkpoints").glob("*/*") if path.suffix == ".json"]
    assert len(written) == bad // STEPS


@pytest.mark.parametrize("wanted", [Request.SAVE, Request.STOP])
def test_a_checkpoint_that_was_agreed_on_before_a_bad_step_is_not_written_after_it(
    wanted: Request, tmp_path: Path
) -> None:
    """What is wanted in step 2 is known in step 3, and done after it."""
    settings, folder = settings_of("topk", log={"every": 100}), tmp_path / "run"
    said, _ = failures(settings, folder, 3, loss_becomes_nan, wanted, wanted_at=2)
    assert said == ["the loss became nan on rank 1 at epoch 0, step 3"] * WORLD_SIZE
    assert not list((folder / "checkpoints").glob("*/*"))


def test_a_finite_gradient_is_used_though_its_norm_is_too_large(tmp_path: Path) -> None:
    """Elements of 1e38 have an infinite sum and an infinite norm in float32."""

    class HugeTask(ToyTask):
        def loss(self, batch: slice) -> Tensor:
            weight = next(self.model.parameters())
            return super().loss(batch) + (1e38 * (weight - weight.detach())).sum()

    optimizer = {"lr": 1e-38, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    settings = settings_of("exact", optimizer=optimizer, epochs=1)
    trainer, _ = train(
        settings, LocalComm.alone(), folder=tmp_path, task=HugeTask(8, Place(0, 1)), reads_late=True
    )
    before = next(ToyTask(8, Place(0, 1)).model.parameters())
    moved = before - next(trainer.task.model.parameters())
    # Eight steps of 1e-38 * 1e38 on weights below 4: each is rounded to 2^-22.
    assert (moved - 8).abs().max() < 8 * 2**-22 + 1e-6
    # 6 x 16 of them; a norm in float64
    lines = [line for line in lines_of(tmp_path) if line["kind"] == "step"]
    assert [line["gradient_norm"] for line in lines] == pytest.approx([1e38 * 96**0.5] * 8, rel=1e-6)


def test_skipping_needs_no_late_reading() -> None:
    settings = settings_of("topk", on_nonfinite="skip")
    with trainer_of(settings, LocalComm.alone(), reads_late=True) as trainer:
        assert not trainer.agreement.reads_late
    with trainer_of(settings_of("topk"), LocalComm.alone(), reads_late=True) as trainer:
        assert trainer.agreement.reads_late


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(every: int, tmp_path: Path) -> None:
    settings = settings_of("sage", log={"every": every})
    (tmp_path / "straight").mkdir()

    def straight(comm: LocalComm) -> Trainer:
        return train(settings, comm, folder=tmp_path / "straight", reads_late=True)[0]

    whole, folder = LocalComm.run(WORLD_SIZE, straight), tmp_path / "stopped"
    LocalComm.run(WORLD_SIZE, lambda comm: train_until(4, settings, comm, folder, reads_late=True))
    found = manifest.newest(folder)
    # Wanted in step 4: known after it where a line is due there, and a step later elsewhere.
    assert found.manifest.step == (5 if every == 1 else 6)

    def resumed(comm: LocalComm) -> Trainer:
        return train(settings, comm, folder=folder, keeps=True, resumed=found, reads_late=True)[0]

    for one, other in zip(whole, LocalComm.run(WORLD_SIZE, resumed), strict=True):
        assert state_of(one) == state_of(other)
    assert lines_of(folder) == lines_of(tmp_path / "straight")
