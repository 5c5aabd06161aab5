"""Several batches a step: what is computed, what is counted, where a run may stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Task
from sage.runfolder import manifest
from tests.ratings import Batch, Given, interactions
from tests.ratings import make_task as make_ratings
from tests.test_language import make_task as make_language
from tests.test_language import numbered
from tests.test_skip import spoil_steps
from tests.toy import NUM_TRAIN, ToyTask, lines_of, settings_of, state_of, train, train_until, trainer_of

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")


def weights_of(trainer: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainer.task.model.parameters()])


def test_four_batches_of_four_are_one_of_sixteen() -> None:
    """On a model without BatchNorm, on one worker and on two."""
    for world_size in (1, 2):

        def worker(comm: LocalComm, batch: int, count: int) -> Tensor:
            settings = settings_of("exact", epochs=3, accumulate_steps=count)
            return weights_of(train(settings, comm, batch, dtype=torch.float64)[0])

        many = LocalComm.run(world_size, lambda comm: worker(comm, 4, 4))
        one = LocalComm.run(world_size, lambda comm: worker(comm, 16, 1))
        # As in test_train.py: sums over 16 samples in another order, 12 steps of lr 0.1 with momentum 0.9.
        assert (many[0] - one[0]).abs().max() < 2e-13
        assert torch.equal(many[0], many[-1])


class WideRatings(Given):
    """In double precision."""

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for users, items, labels in super().train_batches(epoch, start):
            yield users, items, labels.double()


def ratings_gradient(rank: int, batch: int, count: int) -> Tensor:
    """Of a worker's first step."""
    torch.manual_seed(0)
    task = make_ratings(interactions(), batch, Place(rank, 2))
    task.__class__ = WideRatings
    task.model.double().dropout.p = 0.0
    settings = settings_of("exact", accumulate_steps=count)
    with trainer_of(settings, LocalComm.alone(), task=task) as trainer:
        assert trainer.steps_per_epoch == 10
        trainer.compute_gradient(task.train_batches(0))
        return trainer.gradient.flat


def test_four_batches_of_ratings_are_one_of_four_times_as_many() -> None:
    many, one = (ratings_gradient(0, *given) + ratings_gradient(1, *given) for given in ((60, 4), (240, 1)))
    # Of 240 samples of the two workers, each with at most 1 for an element, in another order: 240 * 2^-53 =
    # 2.7e-14 of the sum of magnitudes, divided by 120.
    assert (many - one).abs().max() < 5.4e-14
    assert one.abs().max() > 1e-3


def test_the_hidden_state_goes_from_batch_to_batch_of_a_step() -> None:
    """The windows follow one another, and the weights stay the same between them."""
    text = numbered(14 * 2, num_types=7)
    task = make_language(text, batch=2)
    settings = settings_of("exact", epochs=1, accumulate_steps=2)
    with trainer_of(settings, LocalComm.alone(), task=task) as trainer:
        loss, _ = trainer.compute_gradient(task.train_batches(0))

    by_hand = make_language(text, batch=2)
    batches = by_hand.train_batches(0)
    first, second = by_hand.loss(next(batches)), by_hand.loss(next(batches))
    gradients = torch.autograd.grad((first + second) / 2, list(by_hand.model.parameters()))
    assert loss == torch.stack([first, second]).mean()
    assert torch.equal(task.hidden, by_hand.hidden)
    flat = torch.cat([grad.reshape(-1) for grad in gradients])
    # Half of each and then the sum, or the sum and then half: a power of two. The sums over 6 tokens a window
    # and the two windows are ordered alike but where a weight is used at every token: 12 * 2^-53 of values
    # below 1.
    assert (trainer.gradient.flat - flat).abs().max() < 1.4e-15
    assert flat.abs().max() > 0.01


def test_what_is_left_of_an_epoch_is_a_step_of_its_own_with_its_own_mean(tmp_path: Path) -> None:
    """Five batches, two a step: 2, 2 and 1. And torch's own loop does the same."""
    batch, task = NUM_TRAIN // 5, ToyTask(NUM_TRAIN // 5, Place(0, 1))
    optimizer = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    settings = settings_of("exact", epochs=2, accumulate_steps=2, optimizer=optimizer)
    trainer, summary = train(settings, LocalComm.alone(), batch, tmp_path)
    own = torch.optim.SGD(task.model.parameters(), lr=0.1, fused=True)
    losses = []
    for epoch in range(2):
        batches = list(task.train_batches(epoch))
        assert len(batches) == 5
        for group in (batches[:2], batches[2:4], batches[4:]):
            own.zero_grad()
            found = [task.loss(some) for some in group]
            for loss in found:
                (loss / len(group)).backward()
            losses.append(torch.stack(found).mean().item())
            own.step()
    assert torch.equal(
        weights_of(trainer),
        torch.cat([parameter.detach().reshape(-1) for parameter in task.model.parameters()]),
    )
    lines = lines_of(tmp_path)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["loss"] for line in steps] == losses
    assert [line["step"] for line in steps] == list(range(6))
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [3, 6]
    assert summary["steps"] == 6


def test_the_schedule_counts_steps_and_the_whole_batch(tmp_path: Path) -> None:
    schedule = {"warmup_epochs": 1, "reference_batch": 8, "decay_epochs": [1.5], "decay_factor": 0.1}
    settings = settings_of("exact", schedule=schedule, accumulate_steps=2)
    LocalComm.run(2, lambda comm: train(settings, comm, 4, tmp_path))
    lines = [line for line in lines_of(tmp_path) if line["kind"] == "step"]
    # f = 4 * 2 * 2 / 8 = 2; four steps an epoch, as with batches of 8 in test_train.py.
    expected = [0.1, 0.125, 0.15, 0.175, 0.2, 0.2, 0.02, 0.02]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)


def test_a_step_sends_once_however_many_batches_it_takes(tmp_path: Path) -> None:
    sent = {}
    for count in (1, 4):
        settings = settings_of("topk", epochs=1, reducer={"density": 0.1}, accumulate_steps=count)
        found = LocalComm.run(2, lambda comm, settings=settings: train(settings, comm, 4))
        sent[count] = found[0][1]["totals"]["payload_bytes"]
    assert sent[1] == 4 * sent[4] > 0


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_a_run_that_is_stopped_between_steps_resumes_bit_for_bit(stop_at: int, tmp_path: Path) -> None:
    """Of 8 batches an epoch, three a step: also after the short step."""

    def tasks() -> list[Task]:  # here and not in the threads, which draw from one generator
        text = numbered(24 * 2 + 2, num_types=7)
        return [make_language(text, batch=1, place=Place(rank, 2)) for rank in range(2)]

    settings = settings_of("topk", reducer={"density": 0.1}, accumulate_steps=3)
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    first, second, third = tasks(), tasks(), tasks()

    def run_whole(comm: LocalComm) -> dict[str, Any]:
        return state_of(train(settings, comm, folder=whole, task=first[comm.rank])[0])

    def stop(comm: LocalComm) -> None:
        train_until(stop_at, settings, comm, folder, task=second[comm.rank])

    def resume(comm: LocalComm) -> dict[str, Any]:
        found = manifest.newest(folder)
        given = {"folder": folder, "keeps": True, "resumed": found, "task": third[comm.rank]}
        return state_of(train(settings, comm, **given)[0])

    expected = LocalComm.run(2, run_whole)
    LocalComm.run(2, stop)
    assert LocalComm.run(2, resume) == expected
    assert lines_of(folder) == lines_of(whole)


def test_a_step_that_is_skipped_puts_back_what_all_its_batches_changed(tmp_path: Path) -> None:
    settings = settings_of("topk", epochs=1, on_nonfinite="skip", accumulate_steps=2)
    task = make_language(numbered(14 * 2, num_types=7), batch=2)
    spoil_steps(task, {3}, _to_nan)
    with trainer_of(settings, LocalComm.alone(), task=task) as trainer:
        batches = task.train_batches(0)
        trainer._train_step(batches)
        trainer.position.index = 1
        before = state_of(trainer)
        trainer._train_step(batches)
    assert trainer.position.skipped == 1
    assert state_of(trainer) == before


def _to_nan(task: Task, loss: Tensor) -> Tensor:
    return loss * torch.nan


def test_a_dry_run_counts_steps_and_batches(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["overlap=true", "accumulate_steps=3", "--workers", "2", "--threads", "1", "--dry-run"]
    assert run.main([DIGITS, *words]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["batch"] == "32 a worker, 64 in all, 3 batches a step, 192 in all"
    assert told["steps"] == "8 an epoch, 120 in 15 epochs"  # 1437 images // 64 = 22 batches, 7 * 3 + 1
    assert told["overlap"].startswith("in buckets of 25 MiB")
