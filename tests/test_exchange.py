"""An Exchange: the order of a step, and a state that goes by parameter names into any division into
buckets."""

from typing import Any

import pytest
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from sage.config import Named
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS, Residual, ResidualSettings
from sage.interfaces import Communicator, Progress, Reducer, Seeds, Slot, lay_out
from tests.toy import bits_of

SHAPES = {"a.weight": (6, 8), "a.bias": (6,), "b.weight": (5, 6), "b.bias": (5,)}
NAMES = list(SHAPES)


def layout_of(names: list[str]) -> list[Slot]:
    return lay_out((name, SHAPES[name]) for name in names)


def exchange_of(
    reducer: str,
    names: list[str] = NAMES,
    feedback: str = "residual",
    rank: int = 0,
    scaling: str | dict[str, Any] = "constant",
    **settings: Any,
) -> Exchange:
    layout = layout_of(names)
    config = REDUCERS[reducer].Settings.model_validate(settings)
    built = reducers.build(config, layout, seeds=Seeds.derive(1, rank), device=torch.device("cpu"))
    kept = FEEDBACKS[feedback](
        FEEDBACKS[feedback].Settings.model_validate({"name": feedback}), torch.zeros(layout[-1].stop)
    )
    rule = reducers.build_scaling(scaling_of(scaling), built, layout, torch.device("cpu"))
    return Exchange(kept, built, LocalComm.alone(), layout, scaling=rule)


def scaling_of(scaling: str | dict[str, Any]) -> Named:
    """The settings of a rule's name or section."""
    return reducers._scaling_settings(scaling)


def progress(step: int) -> Progress:
    return Progress(epoch=step / 2, step=step, lr=0.1, steps_per_epoch=2)


def gradients(step: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def step_of(exchange: Exchange, step: int) -> dict[str, Tensor]:
    """One step on the gradients of a step; the mean by parameter name."""
    given = gradients(step)
    flat = torch.cat([given[slot.name].flatten() for slot in exchange.layout])
    exchange.average(flat, progress(step))
    return {slot.name: flat[slot.start : slot.stop].clone() for slot in exchange.layout}


# --- the order of a step --------------------------------------------------------------------------


class Noting(Reducer):
    """An exact reducer that notes what is called, in which order."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def begin_step(self, progress: Progress) -> None:
        self.calls.append("reducer.begin_step")

    def accumulate(self, send: Tensor, grad: Tensor, *, grad_is_mean: bool = False) -> None:
        self.calls.append("accumulate")
        super().accumulate(send, grad)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        self.calls.append("reduce")
        mean.copy_(send)
        send.fill_(3.0)

    def expected_payload_bytes(self, world_size: int) -> int:
        return 0


class NotingFeedback(Residual):
    calls: list[str]

    def begin_step(self, progress: Progress) -> None:
        self.calls.append("feedback.begin_step")

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        self.calls.append("compensate")
        super().compensate(reducer, grad)

    def after_reduce(self, reducer: Reducer) -> None:
        self.calls.append("after_reduce")


def test_a_step_calls_everything_once_in_order() -> None:
    calls: list[str] = []
    feedback = NotingFeedback(ResidualSettings(), torch.zeros(4))
    feedback.calls = calls
    exchange = Exchange(feedback, Noting(calls), LocalComm.alone(), [Slot("w", 0, (4,))])
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    norms = exchange.average(grad, progress(0), measure=True)
    steps = [
        "reducer.begin_step",
        "feedback.begin_step",
        "compensate",
        "accumulate",
        "reduce",
        "after_reduce",
    ]
    assert calls == steps
    assert norms is not None
    assert norms.read() == {
        "residual_norm": 6.0,
        "compression_error": pytest.approx(36 / 30, rel=1e-6),  # two float32 roots: 2^-23 each
    }
    assert exchange.average(grad, progress(1)) is None


def test_what_a_method_leaves_without_an_error_has_no_compression_error() -> None:
    exchange = exchange_of("signsgd", feedback="none")
    norms = exchange.average(torch.ones(exchange.layout[-1].stop), progress(0), measure=True)
    assert norms is not None
    assert set(norms.read()) == {"residual_norm"}


@pytest.mark.parametrize(
    "reducer",
    ["topk", "random_k"],
)
def test_a_density_schedule_follows_the_progress(reducer: str) -> None:
    schedule = {"name": "schedule", "densities": [1.0, 0.5]}
    exchange, found = exchange_of(reducer, scaling=schedule, density=0.1), []
    for step in range(6):  # two steps an epoch
        step_of(exchange, step)
        found.append(round(exchange.reducer.density, 1))
    assert found == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


# --- state ----------------------------------------------------------------------------------------


PAIRS = [
    (reducer, feedback)
    for reducer in REDUCERS
    for feedback in FEEDBACKS
    if feedback != "momentum" or REDUCERS[reducer].is_sparsifier(REDUCERS[reducer].Settings())
]


@pytest.mark.parametrize(("reducer", "feedback"), PAIRS)
def test_six_steps_are_three_and_a_new_exchange_with_its_state_and_three(reducer: str, feedback: str) -> None:
    straight = exchange_of(reducer, feedback=feedback)
    means = [step_of(straight, step) for step in range(6)]

    stopped, resumed = exchange_of(reducer, feedback=feedback), exchange_of(reducer, feedback=feedback)
    for step in range(3):
        step_of(stopped, step)
    resumed.load_state_dict(stopped.state_dict())
    assert bits_of([step_of(resumed, step) for step in range(3, 6)]) == bits_of(means[3:])
    assert bits_of(resumed.state_dict()) == bits_of(straight.state_dict())


def test_a_loaded_state_shares_nothing_with_the_saved_one() -> None:
    first, second = exchange_of("sage"), exchange_of("sage")
    step_of(first, 0)
    state = first.state_dict()
    before = bits_of(state)
    second.load_state_dict(state)
    step_of(second, 1)
    assert bits_of(state) == before


BY_TENSOR = ["topk", "powersgd", "accordion", "signum", "exact"]
"""Methods whose step on one parameter does not depend on the others."""


@pytest.mark.parametrize("reducer", BY_TENSOR)
def test_a_state_goes_by_parameter_into_two_buckets_and_back(reducer: str) -> None:
    whole, again = exchange_of(reducer), exchange_of(reducer)
    halves = [exchange_of(reducer, NAMES[2:]), exchange_of(reducer, NAMES[:2])]  # in another order, too
    for step in range(3):
        step_of(whole, step)
    for half in halves:
        half.load_state_dict(whole.state_dict())
    expected = step_of(whole, 3)
    means = {name: mean for half in halves for name, mean in step_of(half, 3).items()}
    for name in NAMES:
        # a matrix product of one matrix may use another kernel in another batch: 2^-24 a term, 8 terms
        assert torch.allclose(means[name], expected[name], rtol=0, atol=8 * 2.0**-24 * 8)

    states = [half.state_dict() for half in halves]
    merged = {
        "parameters": states[0]["parameters"] | states[1]["parameters"],
        "buckets": states[0]["buckets"] + states[1]["buckets"],
    }
    again.load_state_dict(merged)
    saved = again.state_dict()["parameters"]
    assert bits_of({name: saved[name] for name in NAMES}) == bits_of(
        {name: merged["parameters"][name] for name in NAMES}
    )


def test_numbers_of_a_bucket_come_from_the_same_one_or_from_the_one_that_held_most_of_it() -> None:
    buckets = [exchange_of("sage", NAMES[:2]), exchange_of("sage", NAMES[2:])]
    for bucket, threshold in zip(buckets, (0.25, 0.5), strict=True):
        bucket.reducer.law.lam.fill_(threshold)  # type: ignore[attr-defined]
    states = [bucket.state_dict() for bucket in buckets]
    merged = {
        "parameters": states[0]["parameters"] | states[1]["parameters"],
        "buckets": states[0]["buckets"] + states[1]["buckets"],
    }
    # 48 + 6 elements were in the first, 30 + 5 in the second
    for names, threshold in (
        (NAMES[:2], 0.25),
        (NAMES[2:], 0.5),
        (NAMES, 0.25),
        (["a.bias", "b.weight"], 0.5),
    ):
        loaded = exchange_of("sage", names)
        loaded.load_state_dict(merged)
        assert loaded.reducer.law.lam.item() == threshold  # type: ignore[attr-defined]


def test_a_missing_parameter_and_another_shape_are_errors() -> None:
    exchange, state = exchange_of("topk"), exchange_of("topk").state_dict()
    del state["parameters"]["b.bias"]
    with pytest.raises(
        ValueError, match=r"^state: expected the parameter b\.bias, got a\.weight, a\.bias, b\.weight$"
    ):
        exchange.load_state_dict(state)
    state["parameters"]["b.bias"] = {"feedback.memory": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"memory: expected torch.float32 \(89,\)"):
        exchange.load_state_dict(state)


def test_every_state_name_of_elements_is_one_of_the_state() -> None:
    for owner in (*FEEDBACKS.values(), *(REDUCERS[name] for name in REDUCERS)):
        assert set(owner.element_names) <= set(owner.state_names)
