"""A step whose numbers are not finite is dropped on all workers as if it had never begun, or ends the run."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run
from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Task, TrainingError
from sage.runfolder import manifest
from sage.training import agree
from sage.training.settings import RunSettings
from sage.training.train import Trainer
from tasks.digits import Digits
from tests.cases import CASES
from tests.test_families import make_task
from tests.toy import NormTask, ToyTask, lines_of, settings_of, state_of, train, train_until, trainer_of

WORLD_SIZE, STEPS = 2, 8
"""Of the toy with a batch of 4."""
DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
Spoil = Callable[[Task, Tensor], Tensor]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)  # as run.main sets it


def skipping(name: str, /, **changes: Any) -> RunSettings:
    feedback = "residual" if REDUCERS[name].takes_feedback else "none"
    return settings_of(name, **{"feedback": {"name": feedback}, "on_nonfinite": "skip", **changes})


# --- what spoils a step ---------------------------------------------------------------------------


def loss_becomes_nan(task: Task, loss: Tensor) -> Tensor:
    return loss * math.nan


def loss_becomes_infinite(task: Task, loss: Tensor) -> Tensor:
    return loss + math.inf


def one_gradient_becomes_infinite(task: Task, loss: Tensor) -> Tensor:
    """An element of the last layer's weight, once."""
    weight = list(task.model.parameters())[-2]

    def spoil(grad: Tensor) -> Tensor:
        hook.remove()
        spoiled = grad.clone()
        spoiled[1, 3] = -math.inf
        return spoiled

    hook = weight.register_hook(spoil)
    return loss


def spoil_steps(task: Task, steps: set[int], spoil: Spoil = loss_becomes_nan) -> None:
    """Have the task's loss spoiled in these of its steps, counted over epochs."""
    loss, count = task.loss, iter(range(10**6))

    def spoiled(batch: Any) -> Tensor:
        value = loss(batch)
        return spoil(task, value) if next(count) in steps else value

    task.loss = spoiled  # type: ignore[method-assign]


def spoiled_task(comm: LocalComm, steps: set[int], spoil: Spoil = loss_becomes_nan) -> ToyTask:
    """The toy with BatchNorm; worker 1's is spoiled in these steps."""
    task = NormTask(4, Place(comm.rank, comm.world_size))
    spoil_steps(task, steps if comm.rank == 1 else set(), spoil)
    return task


def states_between_steps(trainer: Trainer) -> list[dict[str, Any]]:
    """Those before the first step and after each, while the trainer runs."""
    states, train_step = [state_of(trainer)], trainer._train_step

    def watched(batches: Iterator[Any]) -> agree.Request:
        request = train_step(batches)
        states.append(state_of(trainer))
        return request

    trainer._train_step = watched  # type: ignore[method-assign]
    trainer.run()
    return states


# --- a dropped step -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_after_a_dropped_step_every_bit_is_what_it_was_on_all_workers(case: Any) -> None:
    settings = skipping(case.reducer, reducer=case.settings, epochs=1)

    def worker(comm: LocalComm) -> list[dict[str, Any]]:
        with trainer_of(settings, comm, task=spoiled_task(comm, {3})) as trainer:
            return states_between_steps(trainer)

    for states in LocalComm.run(WORLD_SIZE, worker):
        assert len(states) == STEPS + 1
        assert states[4] == states[3]
        for before, after in ((states[2], states[3]), (states[4], states[5])):
            for part in ("weights", "buffers", "optimizer"):
                assert after[part] != before[part]


@pytest.mark.parametrize("spoil", [loss_becomes_nan, loss_becomes_infinite, one_gradient_becomes_infinite])
def test_a_run_with_a_dropped_step_is_one_that_was_never_given_its_batch(
    spoil: Spoil, tmp_path: Path
) -> None:
    """Its schedules count the step all the same; here there are none."""
    changes = {"density": 0.1, "threshold": 0.05}
    settings = skipping("sage", reducer=changes, epochs=1, feedback={"name": "residual"})

    def spoiled(comm: LocalComm) -> Trainer:
        return train(settings, comm, folder=tmp_path, task=spoiled_task(comm, {3, 4}, spoil))[0]

    class ShorterTask(NormTask):
        def train_batches(self, epoch: int, start: int = 0) -> Iterator[slice]:
            self.steps_per_epoch = STEPS
            batches = list(super().train_batches(epoch, start))
            self.steps_per_epoch = STEPS - 2
            yield from (batch for number, batch in enumerate(batches) if number not in (3, 4))

    def without(comm: LocalComm) -> Trainer:
        task = ShorterTask(4, Place(comm.rank, comm.world_size))
        task.steps_per_epoch = STEPS - 2
        return train(settings, comm, task=task)[0]

    for one, other in zip(
        LocalComm.run(WORLD_SIZE, spoiled), LocalComm.run(WORLD_SIZE, without), strict=True
    ):
        assert state_of(one) == state_of(other)
        assert (one.position.step, other.position.step) == (STEPS, STEPS - 2)


def test_a_hidden_state_is_what_it_was() -> None:
    tasks = [make_task("python_docs", rank) for rank in range(WORLD_SIZE)]
    spoil_steps(tasks[1], {1})
    settings = skipping("sage", epochs=2)

    def worker(comm: LocalComm) -> list[dict[str, Any]]:
        with trainer_of(settings, comm, task=tasks[comm.rank]) as trainer:
            return states_between_steps(trainer)

    for states in LocalComm.run(WORLD_SIZE, worker):
        hidden = [state["task"]["hidden"] for state in states]
        # Two steps an epoch; the first begins with zeros.
        assert states[2] == states[1]
        assert len(set(hidden)) == 4 == len(hidden) - 1


def test_dropped_steps_are_counted_and_leave_no_line(tmp_path: Path) -> None:
    settings = skipping("sage", log={"every": 3})

    def worker(comm: LocalComm) -> dict[str, Any]:
        task = spoiled_task(comm, {3, 4, STEPS + 7})  # the last step of the second epoch too
        return train(settings, comm, folder=tmp_path, task=task)[1]

    summaries = LocalComm.run(WORLD_SIZE, worker)
    assert [(summary["skipped"], summary["steps"]) for summary in summaries] == [(3, 16)] * 2
    lines = lines_of(tmp_path)
    assert [line["skipped"] for line in lines if line["kind"] == "epoch"] == [2, 3]
    # Due in steps 0, 3, 6, 7, 9, 12 and 15: what a dropped step owes comes with the next one that is used.
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 5, 6, 7, 9, 12]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "step")


# --- what ends the run ----------------------------------------------------------------------------


def errors_of(settings: RunSettings, steps: set[int], spoil: Spoil = loss_becomes_nan) -> list[str]:
    """What every worker says where the run ends early; nothing where it does not."""

    def worker(comm: LocalComm) -> str:
        try:
            train(settings, comm, task=spoiled_task(comm, steps, spoil))
        except TrainingError as error:
            return str(error)
        return ""

    return LocalComm.run(WORLD_SIZE, worker)


def test_so_many_dropped_steps_in_a_row_end_the_run() -> None:
    settings = skipping("topk", skip_limit=3)
    told = "the loss became nan on rank 1 at epoch 1, step 10: step skipped, 3 in a row, which is skip_limit"
    assert errors_of(settings, {6, 7, 10, 8, 9}) == [told.replace("1, step 10", "1, step 8")] * WORLD_SIZE
    assert errors_of(settings, {1, 2, 4, 5, 8, 9, 10}) == [told] * WORLD_SIZE
    assert errors_of(settings, {0, 1, 3, 4, 6, 7, 9, 10, 12, 13}) == [""] * WORLD_SIZE


def test_an_epoch_without_a_step_that_was_used_ends_the_run() -> None:
    told = "every step of an epoch was skipped"
    assert errors_of(skipping("exact", skip_limit=100), set(range(STEPS, 2 * STEPS))) == [told] * WORLD_SIZE


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (loss_becomes_nan, "the loss became nan"),
        (loss_becomes_infinite, "the loss became inf"),
        (one_gradient_becomes_infinite, "the gradient of 2.weight became -inf"),
    ],
)
@pytest.mark.parametrize("every", [1, 100])
def test_without_skipping_the_first_step_that_is_not_finite_ends_the_run(
    spoil: Spoil, told: str, every: int
) -> None:
    settings = settings_of("exact", log={"every": every})
    assert settings.on_nonfinite == "stop"  # the default
    assert errors_of(settings, {9}, spoil) == [f"{told} on rank 1 at epoch 1, step 9"] * WORLD_SIZE


@pytest.mark.parametrize(
    ("overrides", "code", "told"),
    [
        ([], 1, "the gradient of {} became nan on rank 1 at epoch 0, step 2"),
        (
            ["on_nonfinite=skip", "skip_limit=2"],
            1,
            "the gradient of {} became nan on rank 1 at epoch 0, step 3: step skipped, 2 in a row, "
            "which is skip_limit",
        ),
        (["on_nonfinite=skip"], 0, None),
    ],
)
def test_run_py_ends_with_one_line_that_names_epoch_step_tensor_and_rank(
    overrides: list[str],
    code: int,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss, counts, named = Digits.loss, {}, []

    def spoiled(self: Digits, batch: Any) -> Tensor:
        value = loss(self, batch)
        count = counts[self.place.rank] = counts.get(self.place.rank, -1) + 1
        if self.place.rank == 1 and count in (2, 3):
            name, weight = list(self.model.named_parameters())[-1]
            named.append(name)
            hook = weight.register_hook(lambda grad: (hook.remove(), grad * math.nan)[1])
        return value

    monkeypatch.setattr(Digits, "loss", spoiled)
    words = [DIGITS, "epochs=1", "task.batch_per_worker=64", "log.tensorboard=false", "--threads", "1"]
    state = torch.get_rng_state()
    assert run.main([*words, *overrides, "--simulate", "2", "--runs", str(tmp_path)]) == code
    torch.set_rng_state(state)
    said = capsys.readouterr().err.splitlines()
    assert said == ([f"run.py: {told.format(named[0])}"] if told else [])


def test_a_skipped_last_step_of_an_epoch_is_no_difference_between_simulated_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the mean gradients are compared, and a skipped step has none."""
    loss, count = Digits.loss, iter(range(100))

    def spoiled(self: Digits, batch: Any) -> Tensor:
        value = loss(self, batch)
        is_last = self.place.rank == 1 and next(count) == 4
        return value * math.nan if is_last else value

    monkeypatch.setattr(Digits, "loss", spoiled)
    words = ["epochs=1", "task.batch_per_worker=128", "on_nonfinite=skip", "log.tensorboard=false"]  # 5 steps
    assert run.main([DIGITS, *words, "--simulate", "2", "--runs", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("summary.json")
    assert json.loads(path.read_text())["skipped"] == 1


# --- finite all the same --------------------------------------------------------------------------


class HugeTask(ToyTask):
    """Worker 1's gradient of its fifth batch is 1e38 everywhere, and a little."""

    def loss(self, batch: slice) -> Tensor:
        value = super().loss(batch)
        if self.place.rank == 1 and batch.start == 4 + 4 * 8:
            for parameter in self.model.parameters():
                value = value + (1e38 * (parameter - parameter.detach())).sum()
        return value


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_gradient_is_used_though_its_sum_may_be_too_large(
    dtype: torch.dtype, on_nonfinite: str, tmp_path: Path
) -> None:
    """3.4e38 is the most that float32 holds; the mean of the two workers' is finite."""
    optimizer = {"lr": 1e-38, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    # In float32 its norm is infinite, for which a step line would end the run; so step 4 has none.
    changes = {"optimizer": optimizer, "log": {"every": 3}, "on_nonfinite": on_nonfinite, "epochs": 1}
    settings = settings_of("exact", **changes)
    sums = []

    def worker(comm: LocalComm) -> tuple[list[dict[str, Any]], Trainer]:
        task = HugeTask(4, Place(comm.rank, 2), dtype)
        with trainer_of(settings, comm, folder=tmp_path, task=task) as trainer:
            original = trainer.agreement.agree

            def noted(
                evidence: agree.Evidence, *given: Any, **named: Any
            ) -> tuple[agree.Request, list[bool]]:
                sums.append(evidence.values.item())
                return original(evidence, *given, **named)

            trainer.agreement.agree = noted  # type: ignore[method-assign]
            return states_between_steps(trainer), trainer

    told = LocalComm.run(2, worker)
    assert sums.count(math.inf) == (dtype is torch.float32)
    for states, trainer in told:
        assert states[5]["weights"] != states[4]["weights"]
        assert trainer.position.skipped == 0
        fresh = ToyTask(4, Place(0, 1), dtype).model.parameters()
        for parameter, before in zip(trainer.task.model.parameters(), fresh, strict=True):
            # lr 1e38 / 2 = 0.5; all other steps move by less than 1e-36. The weights are below 4: a rounding
            # of 2^-22, and some of 1e38 and 1e-38.
            assert ((before - parameter - 0.5).abs() < 1e-6).all()


def test_the_first_tensor_that_is_not_finite_is_named_with_its_value() -> None:
    huge, bad = torch.full((9,), 1e38), torch.tensor([1.0, math.nan, math.inf])
    assert not huge.sum().isfinite()
    assert agree.find_nonfinite([("a", huge)]) == ""
    assert agree.find_nonfinite([("a", huge), ("b", bad), ("c", bad)]) == "b became nan"
    assert agree.find_nonfinite([("the loss", torch.tensor(-math.inf))]) == "the loss became -inf"


def test_a_finite_gradient_with_an_infinite_norm_is_logged_and_used(tmp_path: Path) -> None:
    """Its norm in float32 is infinite; in float64 it is 1e38 sqrt(n)."""
    optimizer = {"lr": 1e-38, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    settings = settings_of("exact", optimizer=optimizer, log={"every": 1}, epochs=1)
    LocalComm.run(
        2, lambda comm: train(settings, comm, folder=tmp_path, task=HugeTask(4, Place(comm.rank, 2)))
    )
    lines = [line for line in lines_of(tmp_path) if line["kind"] == "step"]
    num_elements = 6 * 16 + 16 + 16 * 2 + 2
    # the mean over workers of the norms: 1e38 sqrt(n) on one, less than 10 on the other; float32 values of
    # 1e38
    assert lines[4]["gradient_norm"] == pytest.approx(1e38 * math.sqrt(num_elements) / 2, rel=1e-6)
    assert all(math.isfinite(line["gradient_norm"]) for line in lines)


def test_a_memory_that_has_grown_beyond_the_largest_number_is_named(tmp_path: Path) -> None:
    """What is not sent of an element is added up: 3e38 twice is more than float32 holds."""
    optimizer = {"lr": 1e-38, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    # Of the bias' two elements one is drawn a step; with this seed the other one soon waits twice.
    changes = {"reducer": {"density": 0.01}, "optimizer": optimizer, "log": {"every": 1}, "seed": 3}
    settings = settings_of("random_k", epochs=1, **changes)

    class GrowingTask(ToyTask):
        def loss(self, batch: slice) -> Tensor:
            bias = self.model.get_parameter("2.bias")
            value = super().loss(batch)
            return value + (3e38 * (bias - bias.detach())).sum() if self.place.rank == 1 else value

    with pytest.raises(
        TrainingError, match=r"what was not sent of 2\.bias became inf on rank 1 at epoch 0, step 1$"
    ):
        LocalComm.run(2, lambda comm: train(settings, comm, task=GrowingTask(4, Place(comm.rank, 2))))


# --- and a stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sage", "powersgd", "exact"])
def test_a_stop_wished_for_in_a_dropped_step_comes_after_the_next_and_loses_nothing(
    name: str, tmp_path: Path
) -> None:
    settings = skipping(name, log={"every": 3}, skip_limit=3)
    (tmp_path / "straight").mkdir()

    def straight(comm: LocalComm) -> Trainer:
        return train(settings, comm, folder=tmp_path / "straight", task=spoiled_task(comm, {3, 4, 11}))[0]

    folder = tmp_path / "stopped"
    whole = LocalComm.run(WORLD_SIZE, straight)
    LocalComm.run(
        WORLD_SIZE,
        lambda comm: train_until(3, settings, comm, folder, task=spoiled_task(comm, {3, 4})),
    )
    found = manifest.newest(folder)
    assert found.manifest.step == 6  # steps 3 and 4 were dropped

    def resumed(comm: LocalComm) -> Trainer:
        task = spoiled_task(comm, {11 - 6})
        return train(settings, comm, folder=folder, task=task, keeps=True, resumed=found)[0]

    for one, other in zip(whole, LocalComm.run(WORLD_SIZE, resumed), strict=True):
        assert state_of(one) == state_of(other)
        assert one.position.state_dict() == other.position.state_dict()
        assert other.position.skipped == 3
    assert lines_of(folder) == lines_of(tmp_path / "straight")
