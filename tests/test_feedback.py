"""Error feedback: numbers by hand, what is conserved, other people's momentum."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS, Feedback
from sage.interfaces import Progress, Reducer, Seeds, Slot
from tests.cases import LAYOUT, N, gradient, layout_of

TWO = layout_of(((2,),))


def feedback_of(name: str, like: Tensor, **settings: Any) -> Feedback:
    return FEEDBACKS[name](FEEDBACKS[name].Settings.model_validate({"name": name, **settings}), like)


def reducer_of(name: str, layout: list = LAYOUT, rank: int = 0, **settings: Any) -> Reducer:
    config = REDUCERS[name].Settings.model_validate(settings)
    return reducers.build(config, layout, seeds=Seeds.derive(1, rank), device=torch.device("cpu"))


def step(
    feedback: Feedback, reducer: Reducer, grad: Tensor, comm: LocalComm, lr: float = 0.1, index: int = 0
) -> Tensor:
    """One exchange; returns the mean (n,)."""
    progress, mean = Progress(index / 10, index, lr, 10), grad.clone()
    layout = [Slot("all", 0, (grad.numel(),))]
    Exchange(feedback, reducer, comm, layout).average(mean, progress)
    return mean


@pytest.mark.parametrize("name", FEEDBACKS)
@pytest.mark.parametrize("reducer", ["topk", "sage", "accordion", "exact"])
def test_a_sparsifier_zeroes_the_gradient_that_joins_the_memory_as_it_is(name: str, reducer: str) -> None:
    """Nothing else changes it: Accordion still reads it, and what joins under momentum is the velocity."""
    feedback, grad = feedback_of(name, torch.zeros(N)), gradient(0, 0)
    kept = grad.clone()
    feedback.compensate(reducer_of(reducer), grad)
    zeroed = name != "momentum" and reducer in ("topk", "sage")
    assert torch.equal(grad, torch.zeros(N) if zeroed else kept)


def by_hand(
    name: str, grads: list[list[float]], lrs: list[float] | None = None, **settings: Any
) -> list[Any]:
    """[mean, memory] of every step of a lone worker that sends the larger of two elements."""
    feedback = feedback_of(name, torch.zeros(2), **settings)
    reducer, comm, seen = reducer_of("global_topk", TWO, density=0.5), LocalComm.alone(), []
    for grad, lr in zip(grads, lrs or [0.1] * len(grads), strict=True):
        mean = step(feedback, reducer, torch.tensor(grad), comm, lr)
        seen.append([mean.tolist(), feedback.memory.tolist()])
    return seen


def test_a_decayed_residual_by_hand() -> None:
    grads = [[4.0, 1.0], [0.25, 0.25], [1.0, 0.0]]
    # a = g + e / 2: (4, 1), then (0.25, 0.75), then (1.125, 0).
    assert by_hand("residual", grads, decay=0.5) == [
        [[4.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.75], [0.25, 0.0]],
        [[1.125, 0.0], [0.0, 0.0]],
    ]


def test_a_corrected_residual_by_hand() -> None:
    grads = [[4.0, 1.0], [3.0, 1.0], [0.0, 0.0]]
    # lr falls to a quarter: what waited weighs 4 times as much; then it doubles: half of it.
    assert by_hand("residual", grads, [0.5, 0.125, 0.25], lr_correction=True) == [
        [[4.0, 0.0], [0.0, 1.0]],
        [[0.0, 5.0], [3.0, 0.0]],
        [[1.5, 0.0], [0.0, 0.0]],
    ]


def test_a_moving_average_of_errors_by_hand() -> None:
    grads = [[4.0, 1.0], [4.0, 1.0], [0.0, 0.0], [4.0, 1.0]]
    # Errors (0, 1) and (0, 1.25): e = (0, 0.25), then 0.75 (0, 0.25) + 0.25 (0, 1.25) = (0, 0.5). The third
    # step has no error: e = 0.75 (0, 0.5). The fourth one starts again at 0.
    assert by_hand("loco", grads, decay=0.75, reset_steps=3) == [
        [[4.0, 0.0], [0.0, 0.25]],
        [[4.0, 0.0], [0.0, 0.5]],
        [[0.0, 0.5], [0.0, 0.375]],
        [[4.0, 0.0], [0.0, 0.25]],
    ]


def test_a_learning_rate_of_zero_leaves_the_memory_unscaled() -> None:
    grads = [[4.0, 1.0], [4.0, 1.0], [4.0, 1.0], [0.0, 0.0]]
    seen = by_hand("residual", grads, [0.0, 0.5, 0.0, 0.25], lr_correction=True)
    # The residual (0, 1) a step adds up at 0, 0.5 and 0; from 0.5, the last positive one, to 0.25 it doubles.
    assert [memory for _, memory in seen[:3]] == [[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]
    assert seen[3] == [[0.0, 6.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("settings", "means", "memories"),
    [
        # u = (4, 1), v = u: 4 is sent, and masked. u = (1, 1.5), v = (1, 2.5): 2.5 is sent.
        ({}, [[4.0, 0.0], [0.0, 2.5]], [[0.0, 1.0], [1.0, 0.0]]),
        # u = (4, 1) is kept. u = (3, 1.5), v = (3, 2.5): 3 is sent.
        ({"masking": False}, [[4.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 2.5]]),
        # u = (2, 0.5), v = (6, 1.5): 6 is sent, and masked. u = (0.5, 0.75), v = (1.5, 3.25): 3.25 is sent.
        ({"nesterov": True}, [[6.0, 0.0], [0.0, 3.25]], [[0.0, 1.5], [1.5, 0.0]]),
        # u = (2, 0.5) is kept. u = (1.5, 0.75), v = (2.5, 3.25).
        ({"nesterov": True, "masking": False}, [[6.0, 0.0], [0.0, 3.25]], [[0.0, 1.5], [2.5, 0.0]]),
    ],
)
def test_momentum_by_hand(settings: dict[str, bool], means: list, memories: list) -> None:
    seen = by_hand("momentum", [[4.0, 1.0], [1.0, 1.0]], momentum=0.5, **settings)
    assert [mean for mean, _ in seen] == means
    assert [memory for _, memory in seen] == memories


SPARSIFIERS = [
    (name, {**settings, "exchange": exchange})
    for name, settings in [
        ("topk", {"density": 0.05}),
        ("global_topk", {"density": 0.05}),
        ("threshold", {"threshold": 0.03}),
        ("sage", {"density": 0.05, "threshold": 0.03}),
    ]
    for exchange in ("gather", "union")
]
every_sparsifier = pytest.mark.parametrize(("name", "settings"), SPARSIFIERS)


@every_sparsifier
def test_what_was_sent_and_what_waits_is_what_was_given(name: str, settings: dict[str, Any]) -> None:
    def worker(comm: LocalComm) -> tuple[Tensor, Tensor]:
        feedback = feedback_of("residual", torch.zeros(N, dtype=torch.float64))
        reducer, total = reducer_of(name, rank=comm.rank, **settings), torch.zeros(N, dtype=torch.float64)
        for index in range(10):
            total += step(feedback, reducer, gradient(comm.rank, index).double(), comm, index=index)
        return total, feedback.memory

    workers = LocalComm.run(3, worker)
    given = torch.stack([gradient(rank, index).double() for rank in range(3) for index in range(10)])
    waiting = torch.stack([memory for _, memory in workers]).mean(0)
    # sum_t out_t + mean_i e_i(T) = sum_t mean_i g_i(t), but for some 60 float64 roundings of partial sums
    bound = 60 * 2.0**-53 * given.abs().sum(0)
    assert ((workers[0][0] + waiting - given.sum(0) / 3).abs() <= bound).all()
    assert waiting.count_nonzero() > 0


def test_the_correction_is_a_memory_in_units_of_the_parameters() -> None:
    lrs, k = [0.1, 0.1, 0.01, 0.3, 0.05, 0.05, 0.2], int(0.05 * N)

    def worker(comm: LocalComm) -> Tensor:
        feedback = feedback_of("residual", torch.zeros(N, dtype=torch.float64), lr_correction=True)
        reducer, weights = reducer_of("global_topk", density=0.05), torch.zeros(N, dtype=torch.float64)
        for index, lr in enumerate(lrs):
            weights -= lr * step(feedback, reducer, gradient(comm.rank, index).double(), comm, lr, index)
        return weights

    # p = lr g + e; w <- w - mean C(p); e = p - C(p)
    weights, memories = np.zeros(N), np.zeros((2, N))
    for index, lr in enumerate(lrs):
        for rank in range(2):
            memories[rank] += lr * gradient(rank, index).double().numpy()
            places = np.argsort(-np.abs(memories[rank]))[:k]
            weights[places] -= memories[rank][places] / 2
            memories[rank][places] = 0
    for got in LocalComm.run(2, worker):
        # 7 steps of some 5 float64 roundings, magnitudes below 10.
        assert np.abs(got.numpy() - weights).max() < 1e-13
    assert np.abs(weights).max() > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_momentum_of_density_1_is_torchs_on_the_mean_gradient(nesterov: bool, masking: bool) -> None:
    def worker(comm: LocalComm) -> Tensor:
        like = torch.zeros(N, dtype=torch.float64)
        feedback = feedback_of("momentum", like, momentum=0.9, nesterov=nesterov, masking=masking)
        reducer, weights = reducer_of("topk", density=1.0), like.clone()
        for index in range(6):
            weights -= 0.1 * step(feedback, reducer, gradient(comm.rank, index).double(), comm)
        return weights

    weights = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    # With masking everything that was sent has no momentum left: plain SGD; in Nesterov's form u adds mu g.
    kept = {"momentum": 0.9, "nesterov": nesterov} if not masking else {}
    scale = 1.9 if masking and nesterov else 1.0
    optimizer = torch.optim.SGD([weights], lr=0.1 * scale, **kept)
    for index in range(6):
        weights.grad = (gradient(0, index).double() + gradient(1, index).double()) / 2
        optimizer.step()
    for got in LocalComm.run(2, worker):
        # 6 steps of a few float64 roundings on magnitudes below 10.
        assert (got - weights.detach()).abs().max() < 1e-13


@every_sparsifier
def test_the_momentum_of_what_left_the_memory_is_masked(name: str, settings: dict[str, Any]) -> None:
    def worker(comm: LocalComm) -> tuple[Tensor, Tensor, Tensor]:
        feedback = feedback_of("momentum", torch.zeros(N))
        reducer = reducer_of(name, rank=comm.rank, **settings)
        mean = step(feedback, reducer, gradient(comm.rank, 0), comm)
        return mean, feedback.memory, feedback.velocity  # type: ignore[attr-defined]

    workers = LocalComm.run(2, worker)
    for mean, memory, velocity in workers:
        sent = memory == 0  # no gradient element is 0
        assert torch.equal(velocity == 0, sent)
        assert 0 < sent.sum() < N
        assert bool((sent == (mean != 0)).all()) == (settings["exchange"] == "union")


FEEDBACK_SETTINGS = [
    ("none", {}),
    ("residual", {}),
    ("residual", {"decay": 0.9, "lr_correction": True}),
    ("loco", {"reset_steps": 4}),
    ("momentum", {}),
    ("momentum", {"nesterov": True, "masking": False}),
]


@pytest.mark.parametrize(("name", "settings"), FEEDBACK_SETTINGS)
def test_six_steps_are_three_and_a_reload_and_three(name: str, settings: dict[str, Any]) -> None:
    lrs = [0.1, 0.2, 0.0, 0.05, 0.1, 0.3]

    def run(comm: LocalComm, broken: bool) -> list[Tensor]:
        feedback = feedback_of(name, torch.zeros(N), **settings)
        reducer, means = reducer_of("topk", density=0.1), []
        for index, lr in enumerate(lrs):
            if broken and index == 3:
                file = io.BytesIO()
                torch.save(feedback.state_dict(), file)
                file.seek(0)
                feedback = feedback_of(name, torch.zeros(N), **settings)
                feedback.load_state_dict(torch.load(file, weights_only=True))
            means.append(step(feedback, reducer, gradient(comm.rank, index), comm, lr, index))
        return means

    straight = LocalComm.run(2, lambda comm: run(comm, False))
    resumed = LocalComm.run(2, lambda comm: run(comm, True))
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
