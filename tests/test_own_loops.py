"""Exchange.step in somebody's own loop: overflows, GradScaler, parameters that only some workers use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reducers import REDUCERS, build_reducer
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Progress
from tests.toy import bits_of

NUM_STEPS = 12
BAD_STEP = 5
SETTINGS: dict[str, dict[str, Any]] = {"powersgd": {"min_compression_rate": 0, "rank": 2}, "svd": {"rank": 2}}


def filled(model: nn.Module) -> nn.Module:
    """The same weights on all workers: threads share torch's global generator, so it cannot be seeded."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) / 3
    return model


def model_of() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))


def exchange_of(model: nn.Module, comm: LocalComm, name: str) -> tuple[GradientBuffer, Exchange]:
    gradient = GradientBuffer(model)
    reducer = build_reducer(name, gradient.layout, worker=comm.rank, **SETTINGS.get(name, {}))
    kind = FEEDBACKS["residual" if reducer.takes_feedback else "none"]
    feedback = kind(kind.Settings(name=kind.Settings.model_fields["name"].default), gradient.flat)
    return gradient, Exchange(feedback, reducer, comm, gradient.layout)


def progress(step: int) -> Progress:
    return Progress(step / 4, step, 0.1, 4)


def loss_of(model: nn.Module, comm: LocalComm, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(100 * step + comm.rank)
    return model(torch.randn(6, 8, generator=rng)).square().mean()


def spoil(model: nn.Module, value: float) -> None:
    weight = model.get_parameter("2.weight")
    assert weight.grad is not None
    weight.grad[0, 0] = value


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_worker(name: str, value: float) -> None:
    def worker(comm: LocalComm) -> None:
        model = model_of()
        gradient, exchange = exchange_of(model, comm, name)
        for step in range(3):
            gradient.zero()
            loss_of(model, comm, step).backward()
            if step == 2 and comm.rank == 1:
                spoil(model, value)
            before = bits_of(exchange.state_dict())
            memory = bits_of(exchange.feedback.memory)
            assert exchange.step(gradient, progress(step)) == (step < 2)
            if step == 2:
                assert bits_of(exchange.state_dict()) == before
                assert bits_of(exchange.feedback.memory) == memory
                for parameter in model.parameters():  # on both workers
                    assert parameter.grad is not None
                    assert parameter.grad.isnan().all()

    LocalComm.run(2, worker)


def train(
    comm: LocalComm, name: str, scale: float | None, spoils: Callable[[int], bool] = lambda step: False
) -> dict[str, Any]:
    """A loop under a GradScaler (None: without), as its documentation writes it, with clipping."""
    model = model_of()
    gradient, exchange = exchange_of(model, comm, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=scale is not None
    )
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, comm, step)).backward()
        if spoils(step) and comm.rank == 1:
            spoil(model, float("inf"))
        exchange.step(gradient, progress(step), scaler=scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return {
        "weights": weights_of(model),
        "scale": scaler.get_scale(),
        "memory": exchange.feedback.memory,
    }


@pytest.mark.parametrize("name", REDUCERS)
def test_one_overflow_under_a_grad_scaler_is_one_skipped_step(name: str) -> None:
    straight = LocalComm.run(2, lambda comm: train(comm, name, 1024.0))
    spoiled = LocalComm.run(2, lambda comm: train(comm, name, 1024.0, lambda step: step == BAD_STEP))
    assert [result["scale"] for result in straight] == [1024.0, 1024.0]
    assert [result["scale"] for result in spoiled] == [512.0, 512.0]  # halved once, on both
    for results in (straight, spoiled):
        assert torch.equal(results[0]["weights"], results[1]["weights"])
        assert results[0]["weights"].isfinite().all()
        assert all(result["memory"].isfinite().all() for result in results)
    assert not torch.equal(straight[0]["weights"], spoiled[0]["weights"])


@pytest.mark.parametrize("name", ["exact", "topk", "sage", "threshold", "sign_norm"])
def test_the_memory_is_in_unscaled_units(name: str) -> None:
    """A scale of a power of two changes no bit of a normal number, in whichever unit."""
    plain = LocalComm.run(2, lambda comm: train(comm, name, None))
    scaled = LocalComm.run(2, lambda comm: train(comm, name, 1024.0))
    for ours, theirs in zip(plain, scaled, strict=True):
        assert torch.equal(ours["weights"], theirs["weights"])
        assert torch.equal(ours["memory"], theirs["memory"])
    assert plain[0]["memory"].any() == (name != "exact")


def test_an_exchange_after_unscale_is_an_error() -> None:
    comm, model = LocalComm.alone(), model_of()
    gradient, exchange = exchange_of(model, comm, "topk")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, comm, step)).backward()
        if step == 0:
            exchange.step(gradient, progress(step), scaler=scaler)  # and the next step may call it again
        scaler.unscale_(optimizer)
        if step == 1:
            before = exchange.feedback.memory.clone()
            with pytest.raises(RuntimeError, match=r"called before scaler\.unscale_, got unscaled"):
                exchange.step(gradient, progress(step), scaler=scaler)
            assert torch.equal(exchange.feedback.memory, before)
        scaler.step(optimizer)
        scaler.update()


class Branches(nn.Module):
    """Each worker may use one of its branches, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        filled(self)

    def forward(self, x: Tensor, branch: str | None) -> Tensor:
        x = self.trunk(x)
        return self.get_submodule(branch)(x) if branch else x


@pytest.mark.parametrize("zeroed_by", ["buffer", "optimizer"])
def test_a_parameter_that_some_workers_use_gets_the_mean_and_one_that_none_uses_no_gradient(
    zeroed_by: str,
) -> None:
    def worker(comm: LocalComm) -> Tensor:
        model = Branches()
        gradient, exchange = exchange_of(model, comm, "exact")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(4):
            gradient.zero() if zeroed_by == "buffer" else optimizer.zero_grad()
            branch = "first" if comm.rank == step % 2 else None
            model(torch.full((2, 4), 1.0 + comm.rank), branch).square().sum().backward()
            own = model.first.weight.grad.clone() if branch else torch.zeros(4, 4)
            exchange.step(gradient, progress(step))
            both = comm.another().all_gather(own)
            assert model.first.weight.grad is not None
            assert torch.equal(model.first.weight.grad, both.sum(0) / 2)
            assert model.second.weight.grad is None
            optimizer.step()
        assert torch.equal(model.second.weight, Branches().second.weight)  # it has not moved, nor decayed
        return weights_of(model)

    first, second = LocalComm.run(2, worker)
    assert torch.equal(first, second)


@pytest.mark.parametrize("feedback", ["residual", "loco", "momentum"])
def test_what_waits_for_a_parameter_goes_on_waiting_while_it_is_unused(feedback: str) -> None:
    comm, model = LocalComm.alone(), Branches()
    gradient = GradientBuffer(model)
    reducer = build_reducer("global_topk", gradient.layout, worker=0, density=0.2)
    kind = FEEDBACKS[feedback]
    kept = kind(kind.Settings(name=feedback), gradient.flat)
    exchange = Exchange(kept, reducer, comm, gradient.layout)
    slots = [slot for slot in gradient.layout if slot.name.startswith("first")]
    for step in range(4):
        gradient.zero()
        branch = "first" if step < 2 else None
        model(torch.ones(2, 4), branch).square().sum().backward()
        before = [getattr(kept, name).clone() for name in kept.element_names]
        exchange.step(gradient, progress(step))
        for slot in slots if branch is None else ():
            for was, name in zip(before, kept.element_names, strict=True):
                now = getattr(kept, name)
                assert torch.equal(now[slot.start : slot.stop], was[slot.start : slot.stop])
    assert before[0][slots[0].start : slots[-1].stop].any()


@pytest.mark.parametrize("name", ["powersgd", "accordion", "signum"])
def test_factors_and_momenta_of_an_unused_parameter_stay_as_they_are(name: str) -> None:
    comm, model = LocalComm.alone(), Branches()
    gradient, exchange = exchange_of(model, comm, name)
    for step in range(3):
        gradient.zero()
        branch = "first" if step < 2 else None
        model(torch.ones(2, 4), branch).square().sum().backward()
        before = exchange.state_dict()["parameters"]["first.weight"]
        exchange.step(gradient, Progress(0.0, step, 0.1, 10))
    after = exchange.state_dict()["parameters"]["first.weight"]
    held = {key for key in before if key.split(".")[-1] in ("memory", "momentum", "p", "q")}
    assert any(before[key].any() for key in held)
    assert bits_of({key: after[key] for key in held}) == bits_of({key: before[key] for key in held})


def test_accumulation_is_a_step_every_few_backwards() -> None:
    comm, model = LocalComm.alone(), model_of()
    gradient, exchange = exchange_of(model, comm, "exact")
    gradient.zero()
    for step in range(3):
        loss_of(model, comm, step).backward()
    exchange.step(gradient, progress(0))
    expected = torch.autograd.grad(
        sum(loss_of(model, comm, step) for step in range(3)), list(model.parameters())
    )
    found = [parameter.grad for parameter in model.parameters()]
    # three float32 additions in another order: 2 units in the last place of the sum of magnitudes, below 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert (ours - theirs).abs().max() <= 2 * 2.0**-23
