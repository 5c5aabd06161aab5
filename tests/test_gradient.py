"""The flat gradient: every param.grad is a view of it, whatever torch does to the gradients."""

from pathlib import Path

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
    gradient.collect()
    assert gradient.flat.count_nonzero() == 0


# --- what training loops do to gradients and parameters ------------------------------------------


def test_gradients_that_zero_grad_removed_are_copied_in_and_become_views_again() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    gradient.flat.fill_(7.0)
    model.zero_grad(set_to_none=True)
    expected = flat_gradient_of(loss_of(model), list(model.parameters()))
    loss_of(model).backward()
    used = gradient.collect()
    assert used == [True] * 6
    assert torch.equal(gradient.flat, expected)
    gradient.distribute(used)
    assert are_views(gradient, model)


def test_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    copied: list[int] = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: copied.append(self.numel()) or copy(self, other))
    for call in (gradient.zero, lambda: model.zero_grad(set_to_none=False)):
        call()
        loss_of(model).backward()
        gradient.distribute(gradient.collect())
    assert copied == []
    model.zero_grad()
    loss_of(model).backward()
    gradient.distribute(gradient.collect())
    assert sum(copied) == 87


def test_a_replaced_gradient_is_copied() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    gradient.zero()
    parameter = model.get_parameter("1.bias")
    parameter.grad = torch.ones_like(parameter)
    assert gradient.collect() == [False, False, True, False, False, False]
    assert gradient.flat.nonzero().flatten().tolist() == [57, 58, 59]


def test_a_gradient_that_was_written_without_a_backward_counts() -> None:
    model = convolutional()
    gradient = GradientBuffer(model)
    gradient.zero()
    model.get_parameter("4.bias").grad[1] = 1.0  # type: ignore[index]
    assert gradient.collect() == [False] * 5 + [True]


def test_a_sparse_gradient_becomes_a_dense_one() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    gradient = GradientBuffer(model)
    model.zero_grad()
    model(torch.tensor([1, 1, 3])).sum().backward()
    assert gradient.collect() == [True]
    assert gradient.flat.tolist() == [0, 0, 2, 2, 0, 0, 1, 1, 0, 0]


MODELS = {
    "channels_last": lambda: convolutional().to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: nn.Sequential(
        nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d), nn.Flatten(), nn.Linear(24, 2)
    ),
    "transposed": lambda: transposed(nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 2))),
    "with gaps": lambda: with_gaps(nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 2))),
}


def transposed(model: nn.Sequential) -> nn.Module:
    for linear in model[1:]:
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())  # type: ignore[union-attr]
    return model


def with_gaps(model: nn.Sequential) -> nn.Module:
    for linear in model[1:]:
        weight = linear.weight.detach()  # type: ignore[union-attr]
        linear.weight = nn.Parameter(weight.repeat_interleave(2, 1)[:, ::2])  # type: ignore[union-attr]
    return model


OPTIMIZERS = [
    (torch.optim.SGD, {"fused": True}),
    (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {"fused": True}),
    *(
        (optimizer, {})
        for optimizer in (
            torch.optim.Adam,
            torch.optim.Adadelta,
            torch.optim.Adafactor,
            torch.optim.Adamax,
            torch.optim.ASGD,
            torch.optim.NAdam,
            torch.optim.RAdam,
            torch.optim.RMSprop,
            torch.optim.Rprop,
        )
    ),
]


@pytest.mark.parametrize(("optimizer_type", "options"), OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_not_row_major_train_as_with_plain_gradients(
    name: str, optimizer_type: type[torch.optim.Optimizer], options: dict[str, bool]
) -> None:
    shape = (4, 2, 3, 3, 3) if name == "channels_last_3d" else (4, 2, 4, 4)
    trained = []
    for uses_buffer in (False, True):
        torch.manual_seed(2)
        model = MODELS[name]()
        assert not all(parameter.is_contiguous() for parameter in model.parameters())
        optimizer = optimizer_type(model.parameters(), lr=0.1, **options)
        gradient = GradientBuffer(model) if uses_buffer else None
        for seed in range(3):
            if gradient:
                gradient.zero()
            else:
                optimizer.zero_grad()
            batch = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            model(batch).square().mean().backward()
            if gradient:
                gradient.distribute(gradient.collect())
            optimizer.step()
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*trained, strict=True))


def test_the_layouts_shape_is_that_of_the_memory() -> None:
    model = convolutional().to(memory_format=torch.channels_last)
    assert GradientBuffer(model).layout[0].shape == (3, 3, 3, 2)  # (O, H, W, I)
    weight = transposed(nn.Sequential(nn.Flatten(), nn.Linear(3, 5)))
    assert GradientBuffer(weight).layout[0].shape == (3, 5)


def replace_head(model: nn.Module) -> None:
    model[4] = nn.Linear(12, 2)  # type: ignore[index,operator]


def assign_weights(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def unfreeze(model: nn.Module) -> None:
    model.get_parameter("1.bias").requires_grad_(True)


CHANGES = {
    "a new head": (replace_head, r"parameter 4\.weight was replaced"),
    "load_state_dict(assign=True)": (assign_weights, r"parameter 0\.weight was replaced"),
    "unfreezing": (unfreeze, r"parameter 1\.bias was added, or was frozen before"),
    "weight_norm": (
        lambda model: nn.utils.parametrizations.weight_norm(model[4]),
        r"parameter 4\.weight is no longer in the model",
    ),
    "an added parameter": (
        lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
        r"parameter scale was added",
    ),
    "another type": (lambda model: model.double(), r"parameter 0\.weight has another type"),
    "another memory format": (
        lambda model: model.to(memory_format=torch.channels_last),
        r"parameter 0\.weight has another type, device, shape or memory format",
    ),
    "tying": (
        lambda model: setattr(model[1], "bias", model[1].weight),
        r"parameter 1\.bias|parameter 1\.weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_changed_are_an_error_that_names_one_and_says_what_to_do(change: str) -> None:
    model = convolutional()
    model.get_parameter("1.bias").requires_grad_(change != "unfreezing")
    gradient = GradientBuffer(model)
    apply, message = CHANGES[change]
    apply(model)
    with pytest.raises(RuntimeError, match=f"({message}).*make a new GradientBuffer and Exchange"):
        gradient.collect()


@pytest.mark.parametrize("zero", ["gradient.zero", "zero_grad", "zero_grad(set_to_none=False)"])
def test_frozen_and_unused_parameters_move_as_in_torch(zero: str) -> None:
    """Under momentum and weight decay: used for two steps, then unused for two, then frozen for two."""
    trained = []
    for uses_buffer in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        gradient, seen = GradientBuffer(model) if uses_buffer else None, []
        for step in range(6):
            if gradient and zero == "gradient.zero":
                gradient.zero()
            else:
                optimizer.zero_grad(set_to_none=gradient is None or zero == "zero_grad")
            if step == 4:
                model[1].requires_grad_(False)
            x = torch.ones(2, 3)
            (model[1](model[0](x)) if step < 2 or step >= 4 else model[0](x)).square().sum().backward()
            if gradient:
                gradient.distribute(gradient.collect())
            optimizer.step()
            seen.append([parameter.detach().clone() for parameter in model.parameters()])
        trained.append(seen)
    for ours, plain in zip(*trained, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits_are_exchanged_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    gradient = GradientBuffer(model)
    for call in (gradient.zero, model.zero_grad):
        call()
        model(torch.ones(4, 3, dtype=dtype)).sum().backward()
        used = gradient.collect()
        assert gradient.flat.dtype == torch.float32
        assert gradient.flat.tolist() == [4.0] * 8
        gradient.flat.mul_(0.5)
        gradient.distribute(used)
        assert model.weight.grad is not None
        assert model.weight.grad.dtype == dtype
        assert model.weight.grad.unique().tolist() == [2.0]


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


def test_models_that_cannot_be_served_are_refused_in_one_line() -> None:
    mixed, complex_one = convolutional(), nn.ParameterList([torch.ones(2, dtype=torch.complex64)])
    mixed.get_submodule("4").double()
    frozen = convolutional().requires_grad_(False)
    for model, message in (
        (
            mixed,
            r"one type and device .*float32 on cpu \(0\.weight\) and torch.float64 on cpu \(4\.weight\)",
        ),
        (complex_one, r"parameter 0: expected a real floating point type, got torch\.complex64"),
        (nn.ReLU(), "expected parameters to train, got none"),
        (frozen, "expected parameters to train, got none"),
        (nn.ParameterList([torch.ones(0)]), "expected parameters to train, got none"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            GradientBuffer(model)
        assert "\n" not in str(error.value)


def test_a_model_that_averages_its_own_gradients_is_refused(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(convolutional())
        with pytest.raises(ValueError, match=r"averages the gradients itself: give .*model\.module"):
            GradientBuffer(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_parameter_without_elements_is_no_lost_view() -> None:
    model = nn.ParameterList([torch.ones(2), torch.ones(0), torch.ones(3)])
    GradientBuffer(model).zero()
