"""The networks of image classification: sizes, shapes, gradients, what training mode changes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from sage.interfaces import Place, Seeds
from tasks import TASKS
from tasks.cifar import MODELS, CifarSettings, build_model
from tasks.models.googlenet import googlenet
from tasks.models.senet import SEPreActBlock

Build = Callable[[int], nn.Module]
CPU = torch.device("cpu")
COUNTS = {
    ("resnet18", 10): 11_173_962,
    ("resnet18", 100): 11_220_132,
    ("vgg16_bn", 10): 15_253_578,
    ("vgg16_bn", 100): 15_299_748,  # 90 more rows of 512 weights and a bias than with 10
    ("googlenet", 10): 6_166_250,
    ("googlenet", 100): 6_258_500,
    ("senet18", 10): 11_260_354,
    ("senet18", 100): 11_306_524,
}
BY_MODE = (nn.BatchNorm2d, nn.Dropout)
"""The modules that do something else in training than in evaluation."""

BUILDS: dict[str, Build] = {name: partial(build_model, name) for name in MODELS}
each_model = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def images(count: int, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def built(build: Build, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return build(num_classes)


# --- sizes and shapes -----------------------------------------------------------------------------


def made_cifar(data: Path, name: str, num_classes: int) -> None:
    """A prepared file with 2 images, of the last classes, for training and for testing."""
    (data / name).mkdir()
    labels = np.arange(num_classes - 2, num_classes, dtype=np.uint8)
    pixels = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    np.savez(data / name / f"{name}.npz", train_x=pixels, train_y=labels, test_x=pixels, test_y=labels)


@pytest.mark.parametrize(("model", "num_classes"), COUNTS, ids=str)
def test_a_cifar_task_trains_the_network_it_names_which_has_its_published_size(
    tmp_path: Path, model: str, num_classes: int
) -> None:
    name = f"cifar{num_classes}"
    made_cifar(tmp_path, name, num_classes)
    settings = TASKS[name].Settings(model=model, batch_per_worker=2)
    TASKS[name].check(settings, tmp_path, world_size=1)
    task = TASKS[name](settings, tmp_path, Place(0, 1), seeds=Seeds.derive(1, 0), device=CPU)
    assert sum(parameter.numel() for parameter in task.model.parameters()) == COUNTS[model, num_classes]
    (batch,) = task.train_batches(0)
    loss = task.loss(batch)  # needs a logit for the last class
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.model.parameters())
    with torch.no_grad():
        assert task.model(batch[0]).shape == (2, num_classes)


def test_the_setting_offers_every_network_and_no_other() -> None:
    assert set(get_args(CifarSettings.model_fields["model"].annotation)) == set(MODELS)


@pytest.mark.parametrize(
    ("model", "sizes", "num_features"),
    [
        ("resnet18", [32, 16, 8, 4], 512),
        ("vgg16_bn", [32, 16, 8, 4, 2], 512),
        ("googlenet", [32, 16, 8], 1024),
        ("senet18", [32, 16, 8, 4], 512),
    ],
)
def test_the_resolution_starts_at_that_of_the_image_and_halves(
    model: str, sizes: list[int], num_features: int
) -> None:
    network, seen = built(BUILDS[model]), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda *found: seen.append(tuple(found[2].shape[2:])))
    with torch.no_grad():
        assert network(images(2)).shape == (2, 10)
    assert list(dict.fromkeys(seen)) == [(size, size) for size in sizes]
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert (classifier.in_features, classifier.out_features) == (num_features, 10)


def test_the_inceptions_have_the_papers_output_channels() -> None:
    network, channels = built(googlenet), []
    for module in network.modules():
        if hasattr(module, "branch4"):
            module.register_forward_hook(lambda *found: channels.append(found[2].shape[1]))
    with torch.no_grad():
        network(images(2))
    # Szegedy et al. 2014, table 1, "output size" of 3a to 5b.
    assert channels == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def test_the_branch_that_stands_for_a_5_by_5_sees_5_by_5() -> None:
    network = built(googlenet).eval()
    inception = next(module for module in network.modules() if hasattr(module, "branch4"))
    x = images(1, size=11, channels=192).requires_grad_()
    inception.branch3(x)[0, :, 5, 5].sum().backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [3, 4, 5, 6, 7]


# --- gradients and modes --------------------------------------------------------------------------


@each_model
def test_the_gradient_reaches_every_parameter(build: Build) -> None:
    # In evaluation mode: a bias before a normalisation has the gradient 0 in training, whatever the network.
    network = built(build).eval()
    F.cross_entropy(network(images(2)), torch.tensor([0, 9])).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@each_model
def test_training_and_evaluation_differ_by_normalisation_and_dropout_only(build: Build) -> None:
    network, x = built(build), images(2)
    with torch.no_grad():
        network(x)  # moves the running statistics away from 0 and 1
        evaluated = network.eval()(x)
        network.train()
        for module in network.modules():
            if isinstance(module, BY_MODE):
                module.eval()
        assert torch.equal(network(x), evaluated)
        assert not torch.equal(network.train()(x), evaluated)


@each_model
def test_only_vgg16_has_dropout_and_so_draws_from_the_global_generator(build: Build) -> None:
    network = built(build)
    before = torch.get_rng_state()
    with torch.no_grad():
        network(images(2))
    assert torch.equal(torch.get_rng_state(), before) == (build is not BUILDS["vgg16_bn"])


@each_model
def test_the_first_weights_follow_from_torchs_seed_alone(build: Build) -> None:
    first = built(build).state_dict()
    np.random.seed(5)  # a global state that must not matter
    second = built(build).state_dict()
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    torch.manual_seed(1)
    other = build(10).state_dict()
    weights = [name for name, values in first.items() if values.dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in weights)


# --- squeeze and excitation -----------------------------------------------------------------------


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """gamma (x - mean) / sqrt(variance + eps) + beta, with the running statistics."""
    shaped = [t.view(1, -1, 1, 1) for t in (norm.weight, norm.running_mean, norm.running_var, norm.bias)]
    gamma, mean, variance, beta = shaped
    return gamma * (x - mean) / (variance + norm.eps).sqrt() + beta


@pytest.mark.parametrize(("channels_in", "stride"), [(32, 1), (32, 2), (16, 1)])
def test_a_block_is_the_pre_activation_residual_times_the_excitation_plus_the_shortcut(
    channels_in: int, stride: int
) -> None:
    torch.manual_seed(0)
    block = SEPreActBlock(channels_in, 32, stride).double()
    x = images(4, size=6, channels=channels_in).double()
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            block(x)  # running statistics other than 0 and 1
        block.eval()
        active = normalised(x, block.norm1).clamp(min=0)
        inner = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
        residual = F.conv2d(normalised(inner, block.norm2).clamp(min=0), block.conv2.weight, padding=1)
        first, second = (
            (fc.weight.flatten(1), fc.bias) for fc in (block.excitation.fc1, block.excitation.fc2)
        )
        squeezed = (residual.mean((2, 3)) @ first[0].T + first[1]).clamp(min=0)  # (4, 2): 32 / 16 channels
        excitation = 1 / (1 + torch.exp(-(squeezed @ second[0].T + second[1])))  # (4, 32)
        changes = (channels_in, stride) != (32, 1)
        shortcut = F.conv2d(active, block.shortcut.weight, stride=stride) if changes else x
        expected = excitation[:, :, None, None] * residual + shortcut
        assert (block.shortcut is not None) == changes
        assert squeezed.shape == (4, 2)
        # float64: about 600 roundings of 2^-53 of numbers below 100 on the way to an element.
        assert (block(x) - expected).abs().max() < 600 * 100 * 2**-53
