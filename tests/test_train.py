"""The loop: what it computes, what it writes, what ends it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sage.exchange.comm import LocalComm
from sage.exchange.gradient import GradientBuffer
from sage.files import write_whole
from sage.interfaces import Place, TrainingError
from sage.runfolder.folder import finish
from sage.training.optim import Schedule
from tests.toy import NUM_TRAIN, ToyTask, settings_of, train

STEP_KEYS = {
    "kind", "epoch", "step", "loss", "lr", "density", "payload_bytes", "padding_bytes", "wire_bytes",
    "compression_error", "gradient_norm", "residual_norm", "seconds",
}  # fmt: skip


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder) if line["kind"] == "step"]


def weights_of(trainer: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainer.task.model.parameters()])


def test_exact_on_four_workers_is_one_worker_on_the_whole_batch(tmp_path: Path) -> None:
    settings = settings_of("exact", epochs=3)
    four = LocalComm.run(4, lambda comm: train(settings, comm, 4, dtype=torch.float64)[0])
    one, _ = train(settings, LocalComm.alone(), 16, dtype=torch.float64)
    # A gradient element is a sum over 16 samples, ordered otherwise: relative error at most 16 * 2^-53 of the
    # sum of magnitudes, about 2e-15. 12 steps of lr 0.1 with momentum 0.9 (a factor below 10) on values of
    # order 1 make at most 12 * 10 * 0.1 * 2e-15 = 2e-14; another factor of 10 allows for curvature.
    for worker in four:
        assert (weights_of(worker) - weights_of(one)).abs().max() < 2e-13
    assert (weights_of(one) - weights_of_fresh(torch.float64)).abs().max() > 0.01


def weights_of_fresh(dtype: torch.dtype) -> Tensor:
    model = ToyTask(4, Place(0, 1), dtype).model
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_one_worker_with_exact_is_torchs_own_loop() -> None:
    settings = settings_of("exact", schedule={"decay_epochs": [1], "decay_factor": 0.5})
    trainer, _ = train(settings, LocalComm.alone(), 16)
    task = ToyTask(16, Place(0, 1))
    weights = [p for p in task.model.parameters() if p.ndim > 1]
    biases = [p for p in task.model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
    for epoch in range(2):
        for batch in task.train_batches(epoch):
            optimizer.zero_grad()
            task.loss(batch).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.5**epoch
            optimizer.step()
    assert torch.equal(
        weights_of(trainer), torch.cat([p.detach().reshape(-1) for p in task.model.parameters()])
    )


RECORDED = {
    "exact": [
        1.0618992197445203, 0.8114229050012547, 1.3389208297796307, 1.7431773066548701,
        0.8330805883308356, 0.6017911647373804, 1.139776387463587, 1.2595757163696026,
        0.9489225917293271, 0.6226978382212129, 1.1542245060917353, 1.0570771746784415,
        0.9037492250699685, 0.6665593858013924, 1.1052199321202412, 1.0571213881707802,
        0.8523074581321959, 0.66704317187947, 1.0195214067586789, 1.0532405419072597,
    ],
    "sage": [
        1.06189921974452, 0.8135861162825706, 1.3411202162709308, 1.735296099334022,
        0.8333125513386979, 0.6022912456731212, 1.134660580146784, 1.2652904647803487,
        0.9581013840830348, 0.6173080327686135, 1.14144609842011, 1.05483994281178,
        0.8917828505987153, 0.666707939186468, 1.0900616049523073, 1.05065241140481,
        0.833975402220884, 0.6813093077167198, 0.9819949336157374, 1.0273314159236047,
    ],
}  # fmt: skip


@pytest.mark.parametrize("reducer", ["exact", "sage"])
def test_the_losses_of_twenty_steps_do_not_change_by_accident(reducer: str, tmp_path: Path) -> None:
    changes = {"density": 0.1, "threshold": 0.05} if reducer == "sage" else {}
    settings = settings_of(reducer, reducer=changes, epochs=5)
    LocalComm.run(2, lambda comm: train(settings, comm, 8, tmp_path, dtype=torch.float64))
    losses = losses_of(tmp_path)
    assert len(losses) == 20
    # float64 sums of at most 16 terms, tanh and the normal numbers that start it may be rounded otherwise on
    # another machine: by 1e-15 a step. That adds up and does not grow: weights and inputs that are off by a
    # share of 1e-8 move no loss by more than 0.8e-8, and no element across the threshold. So 2e-14 after 20
    # steps; 1e-10 is far from it and from any change of the method.
    assert losses == pytest.approx(RECORDED[reducer], rel=1e-10)


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not(tmp_path: Path) -> None:
    def final(seed: int) -> Tensor:
        changes = {"density": 0.1, "threshold": 0.05}
        settings = settings_of("sage", seed=seed, reducer=changes, epochs=4)
        return weights_of(LocalComm.run(2, lambda comm: train(settings, comm, 8)[0])[0])

    assert torch.equal(final(1), final(1))
    assert not torch.equal(final(1), final(2))


def test_every_step_and_epoch_leaves_its_line(tmp_path: Path) -> None:
    settings = settings_of("sage", reducer={"density": 0.1, "threshold": 0.05})
    trainers = LocalComm.run(2, lambda comm: train(settings, comm, 8, tmp_path))
    lines = read_lines(tmp_path)
    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["step"] for line in steps] == list(range(8))
    assert [line["epoch"] for line in steps] == [0] * 4 + [1] * 4
    controller = {"target_density", "union_density", "threshold", "alpha", "beta", "gamma", "density_exam"}
    assert all(set(line) == STEP_KEYS | controller for line in steps)
    phases = {"data", "forward", "backward", "agree", "reduce", "communicate", "optimizer", "log"}
    assert all(set(line["seconds"]) == phases for line in steps)
    assert all(0 < line["seconds"]["communicate"] < line["seconds"]["reduce"] for line in steps)
    assert [line["step"] for line in epochs] == [4, 8]
    assert set(epochs[0]["seconds"]) == phases | {"evaluate", "checkpoint", "wall"}
    # What the steps say adds up to what the epochs and the summary say.
    summary = trainers[0][1]
    for name in ("payload", "padding", "wire"):
        counted = sum(line[f"{name}_bytes"] for line in steps)
        assert sum(line["bytes"][name] for line in epochs) == pytest.approx(counted, rel=1e-12)
        assert summary["totals"][f"{name}_bytes"] == pytest.approx(counted, rel=1e-12)
    densities = [line["density"] for line in steps]
    assert summary["density"]["mean"] == pytest.approx(sum(densities) / 8, rel=1e-12)
    assert summary["density"]["target"] == 0.1
    assert epochs[1]["train"]["loss"] == pytest.approx(sum(losses_of(tmp_path)[4:]) / 4, rel=1e-12)
    assert summary["score"]["last"] == epochs[1]["test"]["loss"]
    assert summary["score"]["best"] == min(line["test"]["loss"] for line in epochs)


def test_density_counts_every_step_also_between_step_lines(tmp_path: Path) -> None:
    changes = {"density": 0.1, "threshold": 0.05}
    often = settings_of("sage", reducer=changes)
    seldom = settings_of("sage", reducer=changes, log={"every": 3})
    (_, a), (_, b) = (train(settings, LocalComm.alone(), 8) for settings in (often, seldom))
    assert a["density"] == b["density"]


def test_step_lines_hold_the_mean_loss_over_workers(tmp_path: Path) -> None:
    LocalComm.run(2, lambda comm: train(settings_of("exact"), comm, 8, tmp_path))
    tasks = [ToyTask(8, Place(rank, 2)) for rank in range(2)]
    first = [task.loss(next(task.train_batches(0))).item() for task in tasks]
    # One float32 sum of two: 2^-24 = 6e-8.
    assert losses_of(tmp_path)[0] == pytest.approx(sum(first) / 2, rel=1e-7)


def test_the_norms_are_the_compressions(tmp_path: Path) -> None:
    settings = settings_of("topk", reducer={"density": 0.25}, epochs=1)
    train(settings, LocalComm.alone(), 64, tmp_path)
    (line,) = (line for line in read_lines(tmp_path) if line["kind"] == "step")
    task = ToyTask(NUM_TRAIN, Place(0, 1))
    gradient = GradientBuffer(task.model)
    task.loss(slice(0, NUM_TRAIN)).backward()
    kept = []
    for slot in gradient.layout:
        part = gradient.flat[slot.start : slot.stop].abs().sort().values
        kept.append(part[: len(part) - max(1, int(0.25 * len(part)))])
    whole, residual = gradient.flat.norm().item(), torch.cat(kept).norm().item()
    # Sums of 146 squares in another order: 146 * 2^-24 = 9e-6 at most.
    assert line["gradient_norm"] == pytest.approx(whole, rel=1e-5)
    assert line["residual_norm"] == pytest.approx(residual, rel=1e-5)
    assert line["compression_error"] == pytest.approx((residual / whole) ** 2, rel=3e-5)


@pytest.mark.parametrize("before", [True, False])
def test_clipping_bounds_the_gradient_where_it_says(before: bool) -> None:
    settings = settings_of("exact", epochs=1, clip={"norm": 0.01, "before_reduce": before})
    gradients = LocalComm.run(2, lambda comm: train(settings, comm, 32)[0].gradient.flat)
    raw = []
    for rank in range(2):
        task = ToyTask(32, Place(rank, 2))
        flat = GradientBuffer(task.model).flat
        task.loss(next(task.train_batches(0))).backward()
        raw.append(flat)
    clipped = [grad * 0.01 / (grad.norm() + 1e-6) for grad in raw]
    mean = sum(raw) / 2
    expected = sum(clipped) / 2 if before else mean * 0.01 / (mean.norm() + 1e-6)
    # Norms as sums of 146 squares in another order: 9e-6 at most, of each worker's clipped gradient.
    largest = max(grad.abs().max() for grad in [expected, *(clipped if before else [])])
    assert (gradients[0] - expected).abs().max() <= 1e-5 * largest


def test_without_feedback_nothing_is_carried_over() -> None:
    for name, kept in (("none", False), ("residual", True)):
        settings = settings_of("topk", reducer={"density": 0.1}, feedback={"name": name}, epochs=1)
        trainer, _ = train(settings, LocalComm.alone(), 16)
        fresh, _ = train(settings, LocalComm.alone(), 16)
        feedback = fresh.exchange.feedback
        feedback.memory.fill_(7.0)
        grad = torch.full_like(fresh.gradient.flat, 0.5)
        feedback.compensate(fresh.exchange.reducer, grad)
        assert feedback.memory.unique().tolist() == [7.5 if kept else 0.5]
        assert trainer.exchange.feedback.memory.count_nonzero() > 0


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    schedule = {"warmup_epochs": 1, "reference_batch": 8, "decay_epochs": [1.5], "decay_factor": 0.1}
    LocalComm.run(2, lambda comm: train(settings_of("exact", schedule=schedule), comm, 8, tmp_path))
    lines = [line for line in read_lines(tmp_path) if line["kind"] == "step"]
    # f = 8 * 2 / 8 = 2; four steps an epoch: 0.1 (1 + e), then 0.2, then 0.02 from epoch 1.5 on.
    expected = [0.1, 0.125, 0.15, 0.175, 0.2, 0.2, 0.02, 0.02]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)
    assert Schedule(**schedule).factor(0.25, 16) == 1.25


def test_the_published_nesterov_step_is_gradient_plus_momentum() -> None:
    optimizer = {"nesterov_form": "published", "lr": 0.01}
    trainer, _ = train(settings_of("exact", optimizer=optimizer), LocalComm.alone(), 16)
    task = ToyTask(16, Place(0, 1))
    momenta = [torch.zeros_like(p) for p in task.model.parameters()]
    for batch in [*task.train_batches(0), *task.train_batches(1)]:
        gradients = torch.autograd.grad(task.loss(batch), list(task.model.parameters()))
        with torch.no_grad():
            for weight, grad, momentum in zip(task.model.parameters(), gradients, momenta, strict=True):
                decayed = grad + (1e-3 * weight if weight.ndim > 1 else 0)
                momentum.mul_(0.9).add_(decayed)
                weight.sub_(0.01 * (decayed + momentum))
    by_hand = torch.cat([p.detach().reshape(-1) for p in task.model.parameters()])
    # 8 steps of a few float32 roundings on weights below 2: 8 * 4 * 2^-24 * 2 = 4e-6.
    assert (weights_of(trainer) - by_hand).abs().max() < 4e-6
    plain, _ = train(settings_of("exact", optimizer={"lr": 0.01}), LocalComm.alone(), 16)
    assert (weights_of(plain) - by_hand).abs().max() > 1e-4


def test_a_run_ends_with_the_first_epoch_that_reaches_its_target(tmp_path: Path) -> None:
    train(settings_of("exact", epochs=6), LocalComm.alone(), 16, tmp_path)
    scores = [line["score"]["value"] for line in read_lines(tmp_path) if line["kind"] == "epoch"]
    target = min(scores[:3])  # lower is better
    first = next(epoch for epoch, score in enumerate(scores) if score <= target)
    _, summary = train(settings_of("exact", epochs=6, stop_at_score=target), LocalComm.alone(), 16, tmp_path)
    assert summary["epochs"] == first + 1 < 6
    assert summary["score"]["reached"] is True
    _, missed = train(settings_of("exact", epochs=2, stop_at_score=0.0), LocalComm.alone(), 16, tmp_path)
    assert (missed["epochs"], missed["score"]["reached"]) == (2, False)


def test_tensorboard_holds_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings_of("exact", log={"tensorboard": True}), LocalComm.alone(), 16, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("step/loss")]  # as float32: 6e-8
    assert logged == [(step, pytest.approx(loss, rel=1e-7)) for step, loss in enumerate(losses_of(tmp_path))]
    assert len(events.Scalars("epoch/test/loss")) == 2
    assert "step/seconds/reduce" in events.Tags()["scalars"]


class PoisonedTask(ToyTask):
    """Its loss is NaN on one worker, at one step."""

    def loss(self, batch: slice) -> Tensor:
        loss = super().loss(batch)
        return loss * math.nan if self.place.rank == 1 and batch.start == 40 else loss


@pytest.mark.parametrize("every", [1, 3, 100])
def test_a_loss_that_is_not_finite_stops_all_workers_and_is_named(every: int, tmp_path: Path) -> None:
    settings = settings_of("exact", epochs=3, log={"every": every})
    errors = []

    def worker(comm: LocalComm) -> None:
        task = PoisonedTask(8, Place(comm.rank, 2))
        with pytest.raises(TrainingError) as caught:
            train(settings, comm, folder=tmp_path, task=task)
        errors.append(str(caught.value))

    LocalComm.run(2, worker)
    # Batches of 16 begin at 0, 16, 32: worker 1's third begins at 40.
    assert errors == ["the loss became nan on rank 1 at epoch 0, step 2"] * 2
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path))
    assert len(losses_of(tmp_path)) == {1: 2, 3: 1, 100: 1}[every]


class DivergedTask(ToyTask):
    """Its last step ruins the weights, which only the evaluation sees."""

    def evaluate(self) -> dict[str, tuple[float, float]]:
        sums = super().evaluate()
        return {name: (math.inf, count) for name, (_, count) in sums.items()}


def test_an_evaluation_that_is_not_finite_is_no_success() -> None:
    with pytest.raises(TrainingError, match="the test loss became inf after epoch 0"):
        train(settings_of("exact"), LocalComm.alone(), task=DivergedTask(8, Place(0, 1)))


class PoisonedGradientTask(ToyTask):
    """A finite loss with a gradient that is not."""

    def loss(self, batch: slice) -> Tensor:
        loss = super().loss(batch)
        if self.place.rank == 1:
            loss.register_hook(lambda grad: grad * math.nan)
        return loss


@pytest.mark.parametrize("reducer", ["exact", "sage", "threshold"])
def test_a_gradient_that_is_not_finite_stops_all_workers(reducer: str) -> None:
    def worker(comm: LocalComm) -> None:
        with pytest.raises(
            TrainingError, match=r"the gradient of 0\.weight became nan on rank 1 at epoch 0, step 0"
        ):
            train(settings_of(reducer), comm, task=PoisonedGradientTask(8, Place(comm.rank, 2)))

    LocalComm.run(2, worker)


class DriftingTask(ToyTask):
    """Worker 1 changes one bit of one weight after the first epoch's training."""

    def evaluate(self) -> dict[str, tuple[float, float]]:
        if self.place.rank == 1:
            weight = self.model[2].weight.data  # type: ignore[index]
            weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
        return super().evaluate()


def test_replicas_that_differ_by_one_bit_are_an_error_that_names_the_tensor() -> None:
    def worker(comm: LocalComm) -> None:
        with pytest.raises(TrainingError, match=r"after epoch 0: 2\.weight of ranks 0 and 1"):
            train(settings_of("exact"), comm, task=DriftingTask(8, Place(comm.rank, 2)))

    LocalComm.run(2, worker)


def test_all_workers_start_from_rank_zeros_weights() -> None:
    def worker(comm: LocalComm) -> Tensor:
        task = ToyTask(8, Place(comm.rank, 2))
        with torch.no_grad():
            task.model[0].weight.add_(comm.rank)  # type: ignore[index,operator]
        return weights_of(train(settings_of("exact"), comm, task=task)[0])

    apart = LocalComm.run(2, worker)
    together = LocalComm.run(2, lambda comm: weights_of(train(settings_of("exact"), comm, 8)[0]))
    assert torch.equal(apart[0], apart[1])
    assert torch.equal(apart[0], together[0])


class NormTask(ToyTask):
    """With BatchNorm, whose running statistics differ between workers."""

    def __init__(self, batch_per_worker: int, place: Place) -> None:
        super().__init__(batch_per_worker, place)
        self.model = torch.nn.Sequential(self.model[0], torch.nn.BatchNorm1d(16), self.model[2])  # type: ignore

    def evaluate(self) -> dict[str, tuple[float, float]]:
        self.model.eval()
        values = super().evaluate()
        self.model.train()
        return values


def test_evaluation_uses_rank_zeros_batchnorm_statistics() -> None:
    def worker(comm: LocalComm) -> Tensor:
        task = NormTask(8, Place(comm.rank, 2))
        train(settings_of("exact"), comm, task=task)
        return task.model[1].running_mean.clone()  # type: ignore

    first, second = LocalComm.run(2, worker)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_metrics_and_checks_are_not_counted_as_the_methods_bytes(tmp_path: Path) -> None:
    LocalComm.run(2, lambda comm: train(settings_of("exact"), comm, 8, tmp_path))
    num_parameters = 6 * 16 + 16 + 16 * 2 + 2
    steps = [line for line in read_lines(tmp_path) if line["kind"] == "step"]
    assert [line["payload_bytes"] for line in steps] == [4 * num_parameters] * 8


def test_bfloat16_computes_low_and_keeps_float32_weights(tmp_path: Path) -> None:
    low, _ = train(settings_of("exact", precision="bfloat16"), LocalComm.alone(), 16)
    full, _ = train(settings_of("exact"), LocalComm.alone(), 16)
    assert weights_of(low).dtype == low.gradient.flat.dtype == torch.float32
    difference = (weights_of(low) - weights_of(full)).abs().max().item()
    # bfloat16 has 8 bits: after 8 steps the weights differ, by less than a few per cent of their size.
    assert 1e-5 < difference < 0.05


def test_final_weights_and_summary_are_whole_and_load(tmp_path: Path) -> None:
    trainer, summary = train(settings_of("exact"), LocalComm.alone(), 16)
    finish(tmp_path, summary, trainer.task.model)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    state = torch.load(tmp_path / "checkpoints" / "final.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in trainer.task.model.state_dict().items())


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
