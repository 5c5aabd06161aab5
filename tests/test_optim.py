"""Schedule, parameter groups, clipping and the optimizers, against torch and numbers worked by hand."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sage.training.optim import SGD, Adam, Schedule, build_optimizer, clip_norm, parameter_groups

# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [
        (0.0, 1.0),
        (1.0, 1.75),  # 1 + 3 * 1/4
        (1.5, 2.125),  # 1 + 3 * 3/8
        (4.0, 4.0),
        (7.75, 4.0),
        (8.0, 2.0),
        (11.75, 2.0),
        (12.0, 1.0),
        (100.0, 1.0),
    ],
)
def test_the_factor_follows_warm_up_scaling_and_decays(epoch: float, factor: float) -> None:
    schedule = Schedule(warmup_epochs=4, reference_batch=128, decay_epochs=(8, 12), decay_factor=0.5)
    assert schedule.factor(epoch, global_batch=512) == factor


@pytest.mark.parametrize(("epoch", "factor"), [(0.0, 1.0), (1.0, 0.625), (2.0, 0.25), (3.0, 0.25)])
def test_a_batch_below_the_reference_lowers_the_rate(epoch: float, factor: float) -> None:
    assert Schedule(warmup_epochs=2, reference_batch=128).factor(epoch, global_batch=32) == factor


@pytest.mark.parametrize(("epoch", "factor"), [(0.0, 1.0), (1.0, 1.0), (3.0, 0.25), (4.0, 0.0625)])
def test_without_a_reference_batch_nothing_is_scaled(epoch: float, factor: float) -> None:
    schedule = Schedule(warmup_epochs=2, decay_epochs=(3, 4), decay_factor=0.25)
    assert schedule.factor(epoch, global_batch=4096) == factor


def test_without_warm_up_the_scaling_is_there_from_the_start() -> None:
    assert Schedule(reference_batch=128).factor(0.0, global_batch=512) == 4.0


def test_decays_inside_the_warm_up_multiply() -> None:
    schedule = Schedule(warmup_epochs=4, reference_batch=1, decay_epochs=(2,), decay_factor=0.5)
    assert schedule.factor(2.0, global_batch=3) == 1.0  # (1 + 2 * 1/2) / 2


def test_the_default_schedule_changes_nothing() -> None:
    assert {Schedule().factor(epoch, global_batch=512) for epoch in (0.0, 0.5, 1000.0)} == {1.0}


# --- parameter groups -----------------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer of every kind; no normalisation layer's name says what it is; two tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.Linear(4, 4)
        self.stem = nn.Conv2d(3, 4, 3)
        self.first = nn.BatchNorm2d(4)
        self.second = nn.LayerNorm(4)
        self.third = nn.GroupNorm(2, 4)
        self.fourth = nn.InstanceNorm1d(4, affine=True)
        self.fifth = nn.RMSNorm(4)
        self.words = nn.Embedding(7, 4)
        self.recurrent = nn.LSTM(4, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(()))


DECAYED = {
    "normal.weight",
    "stem.weight",
    "words.weight",
    "recurrent.weight_ih_l0",
    "recurrent.weight_hh_l0",
    "scale",
}


def groups_by_decay(model: nn.Module, weight_decay: float) -> dict[float, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return {group["weight_decay"]: [names[p] for p in group["params"]] for group in groups}


def test_normalisation_layers_and_biases_are_not_decayed_whatever_their_names() -> None:
    model = Mixed()
    groups = groups_by_decay(model, 0.25)
    assert set(groups) == {0.25, 0.0}
    assert set(groups[0.25]) == DECAYED
    assert set(groups[0.0]) == {name for name, _ in model.named_parameters()} - DECAYED


def test_each_parameter_is_in_exactly_one_group() -> None:
    model = Mixed()
    grouped = [p for group in parameter_groups(model, 0.25) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_frozen_parameters_are_in_no_group() -> None:
    model = Mixed()
    for parameter in (model.stem.weight, model.first.bias):
        parameter.requires_grad_(False)
    names = [name for group in groups_by_decay(model, 0.25).values() for name in group]
    assert {"stem.weight", "first.bias"}.isdisjoint(names)
    assert len(names) == len(list(model.parameters())) - 2


@pytest.mark.parametrize(("model", "decay"), [(nn.LayerNorm(3), 0.0), (nn.Linear(3, 3, bias=False), 0.25)])
def test_there_is_no_empty_group(model: nn.Module, decay: float) -> None:
    (group,) = parameter_groups(model, 0.25)
    assert group["weight_decay"] == decay
    assert group["params"] == list(model.parameters())


def test_the_bias_of_an_attention_layers_projection_is_a_bias() -> None:
    groups = groups_by_decay(nn.MultiheadAttention(4, 2), 0.25)
    assert set(groups[0.25]) == {"in_proj_weight", "out_proj.weight"}


# --- clipping -------------------------------------------------------------------------------------


def clipped_by_torch(tensors: list[Tensor], max_norm: float) -> Tensor:
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 12.999999, 13.0, 13.1, 1e6])
def test_clipping_is_torchs_bit_for_bit_where_the_norm_is_exact(max_norm: float) -> None:
    # Norms 5, 12 and, of all, 13: no rounding in either form, so no tolerance.
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([0.0, 12.0])]
    flat = torch.cat(tensors)
    clip_norm(flat, max_norm)
    assert torch.equal(flat, clipped_by_torch(tensors, max_norm))


@pytest.mark.parametrize("max_norm", [0.5, 20.0])
def test_clipping_is_torchs_on_random_gradients(max_norm: float) -> None:
    rng = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=rng, dtype=torch.float64) for size in (100, 1, 37)]
    flat = torch.cat(tensors)
    clip_norm(flat, max_norm)
    # A sum of 138 squares in any order: relative error at most 138 u, its root half of that, for each of the
    # two forms; a root of norms, a quotient and a product more. Below 150 u, u = 2^-53.
    torch.testing.assert_close(flat, clipped_by_torch(tensors, max_norm), rtol=150 * 2**-53, atol=0)


def test_a_gradient_within_the_limit_keeps_its_bits() -> None:
    grad = torch.randn(50, generator=torch.Generator().manual_seed(1))
    before = grad.clone()
    clip_norm(grad, 2 * before.norm().item())
    assert torch.equal(grad, before)
    zeros = torch.zeros(5)
    clip_norm(zeros, 1.0)
    assert torch.equal(zeros, torch.zeros(5))


def test_a_clipped_gradient_has_the_limits_norm_and_its_direction() -> None:
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    clip_norm(grad, 1.0)
    # 1 / (5 + 1e-6) of it, as torch has it; three roundings.
    expected = torch.tensor([3 / 5.000001, 4 / 5.000001], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=3 * 2**-53, atol=0)


# --- the optimizers -------------------------------------------------------------------------------


def weight_and_bias() -> nn.Linear:
    """Two weights 1 and -2 and a bias 3, in float64."""
    model = nn.Linear(2, 1).double()
    model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    model.bias.data.fill_(3.0)
    return model


def values_after(config: SGD | Adam, gradients: list[list[float]]) -> list[list[float]]:
    """The two weights and the bias after each step."""
    model = weight_and_bias()
    optimizer = build_optimizer(config, model)
    values = []
    for weight_0, weight_1, bias in gradients:
        model.weight.grad = torch.tensor([[weight_0, weight_1]], dtype=torch.float64)
        model.bias.grad = torch.tensor([bias], dtype=torch.float64)
        optimizer.step()
        values.append([*model.weight.flatten().tolist(), model.bias.item()])
    return values


def sgd_by_hand(
    values: list[float], gradients: list[list[float]], config: SGD, decays: list[float]
) -> list[list[float]]:
    """v = m v + g + w p; p -= lr v, or with Nesterov's lr (g + w p + m v)."""
    velocities = [0.0] * 3
    history = []
    for step in gradients:
        gradient = [g + decay * p for g, decay, p in zip(step, decays, values, strict=True)]
        velocities = [config.momentum * v + g for v, g in zip(velocities, gradient, strict=True)]
        ahead = [g + config.momentum * v for g, v in zip(gradient, velocities, strict=True)]
        moves = ahead if config.nesterov else velocities
        values = [p - config.lr * move for p, move in zip(values, moves, strict=True)]
        history.append(values)
    return history


def adam_by_hand(
    values: list[float], gradients: list[list[float]], config: Adam, decays: list[float]
) -> list[list[float]]:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr m' / (sqrt(v') + eps), bias corrected.

    Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """
    (beta_1, beta_2), means, squares = config.betas, [0.0] * 3, [0.0] * 3
    history = []
    for t, step in enumerate(gradients, start=1):
        gradient = [g + decay * p for g, decay, p in zip(step, decays, values, strict=True)]
        means = [beta_1 * m + (1 - beta_1) * g for m, g in zip(means, gradient, strict=True)]
        squares = [beta_2 * v + (1 - beta_2) * g * g for v, g in zip(squares, gradient, strict=True)]
        moves = [
            (m / (1 - beta_1**t)) / (math.sqrt(v / (1 - beta_2**t)) + config.eps)
            for m, v in zip(means, squares, strict=True)
        ]
        values = [p - config.lr * move for p, move in zip(values, moves, strict=True)]
        history.append(values)
    return history


GRADIENTS = [[1.0, 2.0, -4.0], [0.5, -8.0, 2.0], [-3.0, 0.0, 1.0], [0.25, 1.0, 0.0]]
START, DECAYS = [1.0, -2.0, 3.0], [0.125, 0.125, 0.0]  # the bias is not decayed


@pytest.mark.parametrize(
    "momentum",
    [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}],
    ids=["plain", "heavy", "nesterov"],
)
def test_sgd_is_its_formula(momentum: dict[str, float]) -> None:
    config = SGD(lr=0.25, weight_decay=0.125, **momentum)
    # Every number is a small multiple of a power of two, exact in float64: no tolerance.
    assert values_after(config, GRADIENTS) == sgd_by_hand(START, GRADIENTS, config, DECAYS)


def test_sgd_with_nesterov_by_hand() -> None:
    config = SGD(lr=0.5, momentum=0.5, nesterov=True, weight_decay=0.25)
    # Step 1, w = 1, g = 1: d = 1.25, v = 1.25, move d + v/2 = 1.875. Bias, g = -4: v = -4, move -6.
    # Step 2, w = 0.0625, g = 0.5: d = 0.515625, v = 1.140625, move 1.0859375. Bias, g = 2: v = 0, move 2.
    after = values_after(config, GRADIENTS[:2])
    assert [after[0][0], after[0][2]] == [1 - 0.9375, 3 + 3]
    assert [after[1][0], after[1][2]] == [0.0625 - 0.54296875, 6 - 1]


def test_adam_is_its_formula() -> None:
    config = Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.125)
    # torch orders the same operations otherwise: fewer than 30 roundings a step, carried through 4 steps by
    # moves of at most the values' size: far below 1000 u, u = 2^-53.
    torch.testing.assert_close(
        torch.tensor(values_after(config, GRADIENTS), dtype=torch.float64),
        torch.tensor(adam_by_hand(START, GRADIENTS, config, DECAYS), dtype=torch.float64),
        rtol=1000 * 2**-53,
        atol=1000 * 2**-53,
    )


@pytest.mark.parametrize(
    "build", [lambda: SGD(lr=0.5, weight_decay=0.5), lambda: Adam(lr=0.5, weight_decay=0.5)]
)
def test_weight_decay_alone_moves_weights_and_neither_biases_nor_normalisation_layers(
    build: Callable[[], SGD | Adam],
) -> None:
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(build(), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == DECAYED


@pytest.mark.parametrize("config", [SGD(lr=0.1), Adam(lr=0.1)], ids=["sgd", "adam"])
def test_the_optimizer_is_fused_where_torch_can_and_foreach_elsewhere(config: SGD | Adam) -> None:
    fused = build_optimizer(config, nn.Linear(2, 2))
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    elsewhere = build_optimizer(config, nn.Linear(2, 2, device="meta"))
    assert [group["foreach"] for group in elsewhere.param_groups] == [True, True]
    assert not any(group["fused"] for group in elsewhere.param_groups)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_may_begin_later_than_others(nesterov: bool) -> None:
    """A parameter's first gradient comes a step later. All numbers are sums of few powers of two: exact."""
    given: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "nesterov": nesterov}
    moved = []
    for build in (SGD(**given).build, partial(torch.optim.SGD, foreach=False, **given)):
        first, late = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        optimizer = build([{"params": [first, late], "weight_decay": 0.25}])
        for step in range(3):
            first.grad = torch.tensor([1.0, 2.0])
            late.grad = torch.tensor([-1.0, 4.0]) if step else None
            optimizer.step()
        moved.append(torch.stack([first, late]))
    assert not torch.equal(moved[0][0], moved[0][1])
    assert torch.equal(moved[0], moved[1])
