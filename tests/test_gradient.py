"""The flat gradient: every param.grad is a view of it, whatever torch does to the gradients."""

import pytest
import torch
from torch import Tensor, nn

from sage.exchange.gradient import GradientBuffer


class Tied(nn.Module):
    """A language model in small: the output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


def convolutional() -> nn.Module:
    """A model with parameters of 0, 1, 2 and 4 dimensions."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.PReLU(), nn.Flatten(), nn.Linear(12, 2)
    )


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return model(torch.randn(4, 2, 4, 4, generator=rng)).square().mean()


def flat_gradient_of(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(n,), by autograd.grad, which writes no param.grad."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])


def are_views(gradient: GradientBuffer, model: nn.Module) -> bool:
    """Whether a write to the flat gradient is a write to every param.grad, and all of flat is theirs."""
    gradient.flat.copy_(torch.arange(gradient.flat.numel()))
    seen = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.equal(seen, torch.arange(gradient.flat.numel(), dtype=seen.dtype))


def test_the_flat_gradient_is_the_concatenation_of_the_gradients() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    for seed in range(2):
        gradient.zero()
        expected = flat_gradient_of(loss_of(model, seed), list(model.parameters()))
        loss_of(model, seed).backward()
        assert expected.count_nonzero() > 0
        assert torch.equal(gradient.flat, expected)


def test_the_layout_names_every_parameter_in_flat_order() -> None:
    gradient = GradientBuffer(convolutional())
    found = [(slot.name, slot.start, slot.stop, slot.shape) for slot in gradient.layout]
    assert found == [
        ("0.weight", 0, 54, (3, 2, 3, 3)),
        ("1.weight", 54, 57, (3,)),
        ("1.bias", 57, 60, (3,)),
        ("2.weight", 60, 61, (1,)),
        ("4.weight", 61, 85, (2, 12)),
        ("4.bias", 85, 87, (2,)),
    ]
    assert gradient.flat.shape == (87,)


def test_two_backwards_add_up() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    parts = [flat_gradient_of(loss_of(model, seed), list(model.parameters())) for seed in range(2)]
    for seed in range(2):
        loss_of(model, seed).backward()
    assert torch.equal(gradient.flat, parts[0] + parts[1])


@pytest.mark.parametrize("implementation", ["fused", "foreach", "plain"])
@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam])
def test_the_views_survive_backward_clipping_and_the_optimizer(
    optimizer_type: type[torch.optim.SGD] | type[torch.optim.Adam], implementation: str
) -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    chosen = {implementation: True} if implementation != "plain" else {"foreach": False}
    optimizer = optimizer_type(model.parameters(), lr=0.1, weight_decay=0.1, **chosen)
    for seed in range(2):
        gradient.zero()
        loss_of(model, seed).backward()
        before = gradient.flat.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert gradient.flat.norm() < 0.5 * before.norm()
        optimizer.step()
        gradient.check()
        assert are_views(gradient, model)


def test_what_is_written_to_the_flat_gradient_is_what_the_optimizer_applies() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient.flat.copy_(torch.arange(87) - 40)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(after, before - (torch.arange(87) - 40))


def test_zero_zeroes_every_gradient_and_keeps_the_views() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    loss_of(model).backward()
    gradient.zero()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    assert are_views(gradient, model)


def test_zero_grad_that_keeps_the_gradients_is_allowed() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    loss_of(model).backward()
    model.zero_grad(set_to_none=False)
    gradient.check()
    assert gradient.flat.count_nonzero() == 0


@pytest.mark.parametrize("call", ["zero", "check"])
def test_zero_grad_with_set_to_none_is_an_error_that_names_the_parameter(call: str) -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight .*set_to_none=True.*GradientBuffer\.zero"):
        getattr(gradient, call)()


@pytest.mark.parametrize("name", ["1.bias", "4.bias"])
def test_a_replaced_gradient_is_an_error_that_names_its_parameter(name: str) -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    parameter = model.get_parameter(name)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match=f"gradient of {name} is no longer a view"):
        gradient.zero()


def test_a_model_converted_after_the_buffer_was_made_is_an_error() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    model.double()
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight is no longer a view"):
        gradient.check()


def test_frozen_parameters_have_no_place_and_no_gradient() -> None:
    model = convolutional()
    model.get_parameter("0.weight").requires_grad_(False)
    model.get_parameter("4.bias").requires_grad_(False)
    gradient = GradientBuffer(model)
    assert [slot.name for slot in gradient.layout] == ["1.weight", "1.bias", "2.weight", "4.weight"]
    assert [slot.start for slot in gradient.layout] == [0, 3, 6, 7]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = flat_gradient_of(loss_of(model), trained)
    loss_of(model).backward()
    assert torch.equal(gradient.flat, expected)
    assert model.get_parameter("0.weight").grad is None
    gradient.zero()


def test_a_tied_weight_has_one_place_that_gets_both_gradients() -> None:
    torch.manual_seed(1)
    model = Tied()
    gradient = GradientBuffer(model)
    assert [(slot.name, slot.start) for slot in gradient.layout] == [
        ("embedding.weight", 0),
        ("output.bias", 15),
    ]
    tokens = torch.tensor([0, 3, 3])
    expected = flat_gradient_of(model(tokens).square().sum(), [model.embedding.weight, model.output.bias])
    model(tokens).square().sum().backward()
    assert torch.equal(gradient.flat, expected)
    assert (
        gradient.flat[:15].view(5, 3).count_nonzero(dim=1).min() > 0
    )  # rows of tokens that were not read too


def test_the_flat_gradient_has_the_parameters_dtype() -> None:
    assert GradientBuffer(convolutional().double()).flat.dtype == torch.float64


def test_parameters_of_different_dtypes_are_refused() -> None:
    model = convolutional()
    model.get_submodule("4").double()
    with pytest.raises(ValueError, match=r"one dtype and device .* got 2 kinds"):
        GradientBuffer(model)


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one dtype and device .* got 0 kinds"):
        GradientBuffer(nn.ReLU())


def test_a_parameter_without_elements_is_no_lost_view() -> None:
    model = nn.ParameterList([torch.ones(2), torch.ones(0), torch.ones(3)])
    GradientBuffer(model).zero()
