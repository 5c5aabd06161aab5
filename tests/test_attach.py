"""reducers.attach: a model's exchange in one object, in somebody's own loop."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reducers
from reducers import REDUCERS, build_reducer
from sage.exchange.attached import AttachedExchange
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS, Momentum, NoFeedback, Residual
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Progress
from tests.test_own_loops import SETTINGS, filled, loss_of, model_of, spoil, weights_of
from tests.toy import bits_of

STEPS_PER_EPOCH, LR = 3, 0.1


def attached(model: nn.Module, comm: LocalComm, name: str, **given: Any) -> AttachedExchange:
    return reducers.attach(
        model, name, comm=comm, steps_per_epoch=STEPS_PER_EPOCH, **SETTINGS.get(name, {}), **given
    )


def by_the_long_way(comm: LocalComm, name: str, num_steps: int) -> tuple[Tensor, Any]:
    """What attach is made of, written out."""
    model = model_of()
    gradient = GradientBuffer(model)
    reducer = build_reducer(name, gradient.layout, worker=comm.rank, **SETTINGS.get(name, {}))
    kind = FEEDBACKS["residual" if reducer.takes_feedback and name != "exact" else "none"]
    feedback = kind(kind.Settings.model_validate({}), gradient.flat)
    exchange = Exchange(feedback, reducer, comm, gradient.layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(num_steps):
        gradient.zero()
        loss_of(model, comm, step).backward()
        exchange.step(gradient, Progress(step / STEPS_PER_EPOCH, step, LR, STEPS_PER_EPOCH))
        optimizer.step()
    return weights_of(model), bits_of(exchange.state_dict())


def train(
    exchange: AttachedExchange, model: nn.Module, comm: LocalComm, steps: range, sets_to_none: bool = True
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in steps:
        exchange.zero_grad() if not sets_to_none else optimizer.zero_grad()
        loss_of(model, comm, step).backward()
        exchange.step(lr=LR)
        optimizer.step()


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("sets_to_none", [True, False])
def test_attach_is_the_long_way_bit_for_bit(name: str, sets_to_none: bool) -> None:
    def worker(comm: LocalComm) -> tuple[Tensor, Any]:
        model = model_of()
        exchange = attached(model, comm, name)
        train(exchange, model, comm, range(7), sets_to_none)
        state = exchange.state_dict()
        assert state.pop("step") == 7
        return weights_of(model), bits_of(state)

    long_way = LocalComm.run(2, lambda comm: by_the_long_way(comm, name, 7))
    for ours, theirs in zip(LocalComm.run(2, worker), long_way, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


@pytest.mark.parametrize("name", REDUCERS)
def test_seven_steps_are_three_and_a_reload_and_four(name: str) -> None:
    def worker(comm: LocalComm, breaks: bool) -> tuple[Tensor, Any]:
        model = model_of()
        exchange = attached(model, comm, name)
        train(exchange, model, comm, range(3))
        if breaks:
            state, again = exchange.state_dict(), model_of()
            again.load_state_dict(model.state_dict())
            model, exchange = again, attached(again, comm, name, seed=7)
            exchange.load_state_dict(state)
        train(exchange, model, comm, range(3, 7))
        return weights_of(model), bits_of(exchange.state_dict())

    straight = LocalComm.run(2, lambda comm: worker(comm, breaks=False))
    broken = LocalComm.run(2, lambda comm: worker(comm, breaks=True))
    for ours, theirs in zip(broken, straight, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def test_a_schedule_follows_the_counted_steps_or_the_given_epoch() -> None:
    schedule = {"name": "schedule", "densities": [1.0, 0.5]}
    for counted in (True, False):
        comm, model, found = LocalComm.alone(), model_of(), []
        exchange = reducers.attach(
            model,
            "global_topk",
            comm=comm,
            steps_per_epoch=2 if counted else None,
            density=0.1,
            scaling=schedule,
        )
        for step in range(6):
            loss_of(model, comm, step).backward()
            exchange.step() if counted else exchange.step(epoch=step / 2)
            found.append(round(exchange.density, 1))
        assert found == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "settings", "missing"),
    [
        ("topk", {"scaling": {"name": "schedule", "warmup_epochs": 2}}, "epoch"),
        ("topk", {"feedback": {"name": "residual", "lr_correction": True}}, "lr"),
        ("accordion", {}, "epoch"),
    ],
)
def test_a_schedule_that_follows_what_the_loop_does_not_say_is_an_error(
    name: str, settings: dict[str, Any], missing: str
) -> None:
    comm, model = LocalComm.alone(), model_of()
    exchange = reducers.attach(model, name, comm=comm, **settings)
    loss_of(model, comm, 0).backward()
    with pytest.raises(ValueError, match=f"^{missing}: expected .* the reducer or its feedback follows it"):
        exchange.step()
    assert exchange.state_dict()["step"] == 0


def test_a_loop_that_says_nothing_needs_nothing() -> None:
    for name in set(REDUCERS) - {"accordion"}:
        comm, model = LocalComm.alone(), model_of()
        exchange = reducers.attach(model, name, comm=comm, **SETTINGS.get(name, {}))
        for step in range(2):
            loss_of(model, comm, step).backward()
            assert exchange.step()


def test_every_worker_gets_the_weights_and_buffers_of_rank_0() -> None:
    def worker(comm: LocalComm) -> dict[str, Tensor]:
        model = filled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(comm.rank)
        reducers.attach(model, "exact", comm=comm)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        return model.state_dict()

    first, second = LocalComm.run(2, worker)
    assert bits_of(first) == bits_of(second)
    assert first["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_is_a_step_that_no_worker_can_use(value: float) -> None:
    def worker(comm: LocalComm) -> None:
        model = model_of()
        exchange = attached(model, comm, "sage")
        usable = []
        for step in range(3):
            exchange.zero_grad()
            loss_of(model, comm, step).backward()
            if step == 1 and comm.rank == 1:
                spoil(model, value)
            usable.append(exchange.step(lr=LR))
        assert usable == [True, False, True]
        assert exchange.exchange.feedback.memory.isfinite().all()

    LocalComm.run(2, worker)


def test_a_grad_scaler_skips_one_step_and_the_memory_is_in_unscaled_units() -> None:
    def worker(comm: LocalComm, scale: float) -> tuple[Tensor, Tensor]:
        model = model_of()
        exchange = attached(model, comm, "topk")
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scale > 1)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, comm, step)).backward()
            exchange.step(scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        return weights_of(model), exchange.exchange.feedback.memory

    for ours, theirs in zip(
        LocalComm.run(2, lambda comm: worker(comm, 1024.0)),
        LocalComm.run(2, lambda comm: worker(comm, 1.0)),
        strict=True,
    ):
        assert torch.equal(ours[0], theirs[0])  # a power of two changes no bit of a normal number
        assert torch.equal(ours[1], theirs[1])


def test_error_feedback_is_the_default_where_there_is_an_error() -> None:
    def feedback_of(name: str, **given: Any) -> type:
        return type(reducers.attach(model_of(), name, comm=LocalComm.alone(), **given).exchange.feedback)

    assert feedback_of("topk") is Residual
    assert feedback_of("signum") is NoFeedback
    assert feedback_of("exact") is NoFeedback
    assert feedback_of("exact", dtype="bfloat16") is Residual
    assert feedback_of("topk", feedback="none") is NoFeedback
    assert feedback_of("topk", feedback={"name": "momentum", "momentum": 0.8}) is Momentum


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("sge", {}, "reducer.name: expected one of .*; did you mean sage?"),
        ("sage", {"densty": 0.1}, "reducer.densty: unknown key; did you mean density?"),
        ("sage", {"feedback": "residul"}, "feedback.name: expected one of .*; did you mean residual?"),
        ("topk", {"feedback": {"name": "residual", "decay": 2}}, r"feedback.decay: expected .*, got 2"),
        ("signum", {"feedback": "residual"}, "feedback.name: expected none, since signum leaves no error"),
        ("powersgd", {"feedback": "momentum"}, "feedback.name: momentum: expected a reducer that sends"),
        ("topk", {"steps_per_epoch": 0}, "steps_per_epoch: expected at least 1, got 0"),
    ],
)
def test_a_bad_keyword_is_named(name: str, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        reducers.attach(model_of(), name, comm=LocalComm.alone(), **given)


@pytest.mark.parametrize("name", ["exact", "topk", "sage", "powersgd"])
def test_a_worker_without_batches_takes_part_until_no_worker_has_one(name: str) -> None:
    def worker(comm: LocalComm, num_batches: list[int]) -> tuple[Tensor, Tensor, int]:
        model = model_of()
        exchange = attached(model, comm, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for epoch in range(2):
            for step in range(num_batches[comm.rank]):
                optimizer.zero_grad()
                loss_of(model, comm, 10 * epoch + step).backward()
                assert exchange.step()
                optimizer.step()
            for is_usable in exchange.steps_of_others():
                assert is_usable
                optimizer.step()
        return weights_of(model), exchange.exchange.feedback.memory, exchange.state_dict()["step"]

    first, second, third = LocalComm.run(3, lambda comm: worker(comm, [2, 5, 3]))
    assert [first[2], second[2], third[2]] == [10, 10, 10]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])

    # With even numbers nothing is added.
    even = LocalComm.run(3, lambda comm: worker(comm, [2, 2, 2]))
    assert [steps for *_, steps in even] == [4, 4, 4]


def test_the_mean_of_uneven_workers_divides_by_all_of_them() -> None:
    def worker(comm: LocalComm) -> list[Tensor]:
        model = nn.Linear(1, 1, bias=False)
        exchange = reducers.attach(model, "exact", comm=comm)
        found = []
        for _ in range(1 + comm.rank):
            exchange.zero_grad()
            (3.0 * model(torch.ones(1, 1))).sum().backward()
            exchange.step()
            found.append(model.weight.grad.clone())  # type: ignore[union-attr]
        for _ in exchange.steps_of_others():
            found.append(model.weight.grad.clone())  # type: ignore[union-attr]
        return found

    for found in LocalComm.run(2, worker):
        assert [grad.item() for grad in found] == [3.0, 1.5]
