"""Image classification: who sees which image, augmentation, normalisation, scores, and the data sets."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from reducers import build_reducer
from sage.exchange.comm import LocalComm
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Place, Seeds
from tasks.classification import Augmentation, ImageClassification, ImageSet
from tasks.data import digits
from tasks.data.cifar import CIFAR10
from tasks.digits import Digits, DigitsSettings
from tasks.models.resnet import resnet18

CPU = torch.device("cpu")
Batches = list[tuple[Tensor, Tensor]]


def numbered(num_train: int, num_test: int = 1) -> ImageSet:
    """Images (N, 3, 2, 1) whose pixels, and whose label, are the image's number."""
    train, test = (np.arange(count, dtype=np.uint8) for count in (num_train, num_test))
    spread = [np.tile(part[:, None, None, None], (1, 3, 2, 1)) for part in (train, test)]
    return ImageSet(spread[0], train, spread[1], test)


class Given(ImageClassification):
    """On images given by a test."""

    @classmethod
    def check(cls, config: object, data: Path, world_size: int) -> None:
        raise NotImplementedError


def make_task(
    images: ImageSet,
    batch: int,
    place: Place | None = None,
    *,
    model: nn.Module | None = None,
    augmentation: Augmentation | None = None,
    seed: int = 1,
) -> ImageClassification:
    place = place or Place(0, 1)
    return Given(
        model or nn.Identity(),
        images,
        batch,
        place,
        seeds=Seeds.derive(seed, place.rank),
        device=CPU,
        augmentation=augmentation,
    )


def numbers_in(batches: Batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def same_batches(some: Batches, others: Batches) -> bool:
    """Bit for bit, and as many."""
    assert some
    pairs = zip(some, others, strict=True)
    return all(torch.equal(x, other_x) and torch.equal(y, other_y) for (x, y), (other_x, other_y) in pairs)


# --- which image is where -------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_workers_batches_are_the_single_workers_global_batch_cut_in_pieces(world_size: int) -> None:
    images = numbered(50)
    single = list(make_task(images, 4 * world_size).train_batches(epoch=3))
    tasks = [make_task(images, 4, Place(rank, world_size)) for rank in range(world_size)]
    workers = [list(task.train_batches(epoch=3)) for task in tasks]
    assert {task.steps_per_epoch for task in tasks} == {50 // (4 * world_size)} == {len(single)}
    joined = [
        (torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step]))
        for step in zip(*workers, strict=True)
    ]
    assert same_batches(joined, single)


def test_an_epoch_visits_no_image_twice_and_all_but_the_incomplete_batch() -> None:
    tasks = [make_task(numbered(50), 4, Place(rank, 3)) for rank in range(3)]
    visited = [n for task in tasks for batch in numbers_in(list(task.train_batches(0))) for n in batch]
    assert len(visited) == len(set(visited)) == 48


def test_a_label_goes_with_its_image() -> None:
    for images, labels in make_task(numbered(50), 5).train_batches(0):
        # The mean 24.5 and the deviation, sqrt((50^2 - 1) / 12), undone; numbers are a unit apart, so that
        # rounding finds the one meant.
        shown = images * math.sqrt(2499 / 12) + 24.5
        assert images.shape == (5, 1, 3, 2)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(shown.round(), labels.view(-1, 1, 1, 1).expand_as(shown).float())


def test_epochs_and_seeds_differ_in_order_and_in_what_they_leave_out() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        batches = make_task(numbered(50), 8, seed=seed).train_batches(epoch)
        return torch.cat([labels for _, labels in batches]).tolist()

    orders = [order(epoch, seed) for epoch in range(3) for seed in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert len(set(map(frozenset, orders))) > 1
    assert all(found != sorted(found) for found in orders)


@pytest.mark.parametrize(
    "augmentation", [None, Augmentation(padding=1, flip=True)], ids=["plain", "augmented"]
)
def test_an_epoch_started_late_is_the_tail_of_the_whole_epoch(augmentation: Augmentation | None) -> None:
    task = make_task(numbered(50), 4, Place(1, 3), augmentation=augmentation)
    whole = list(task.train_batches(2))
    assert len(whole) == 4
    for start in range(4):
        assert same_batches(list(task.train_batches(2, start)), whole[start:])
    assert list(task.train_batches(2, start=4)) == []


def test_batches_neither_follow_nor_move_the_global_generator() -> None:
    def batches() -> Batches:
        augmentation = Augmentation(padding=2, flip=True)
        return list(make_task(numbered(50), 8, augmentation=augmentation).train_batches(0))

    first = batches()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert same_batches(batches(), first)
    assert torch.equal(torch.get_rng_state(), state)


class Witness(nn.Module):
    """Notes the number of each image of 0 to 9 that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        # Mean 4.5 and deviation sqrt((10^2 - 1) / 12) undone; a unit apart.
        self.seen += (images[:, 0, 0, 0] * math.sqrt(99 / 12) + 4.5).round().long().tolist()
        return torch.zeros(len(images), 10)


@pytest.mark.parametrize(("num_test", "shares"), [(10, [4, 3, 3]), (9, [3, 3, 3]), (2, [1, 1, 0])])
def test_each_test_image_is_counted_once_at_3_workers(num_test: int, shares: list[int]) -> None:
    witnesses = [Witness() for _ in range(3)]
    images = numbered(10, num_test)
    sums = [make_task(images, 1, Place(rank, 3), model=witnesses[rank]).evaluate() for rank in range(3)]
    assert [len(witness.seen) for witness in witnesses] == shares
    assert sorted(number for witness in witnesses for number in witness.seen) == list(range(num_test))
    for name in ("loss", "accuracy"):
        assert [count for _, count in (one[name] for one in sums)] == shares
    assert sum(one["accuracy"][0] for one in sums) == 1  # all are called class 0, which image 0 alone is


def test_more_test_images_than_one_evaluation_batch_are_each_counted_once() -> None:
    once = numbered(10, 10)
    images = ImageSet(
        once.train_x, once.train_y, np.tile(once.test_x, (101, 1, 1, 1)), np.tile(once.test_y, 101)
    )
    witness = Witness()
    sums = make_task(images, 1, model=witness).evaluate()
    assert witness.seen == list(range(10)) * 101
    assert sums["accuracy"] == (101.0, 1010.0)


# --- augmentation ---------------------------------------------------------------------------------


def random_images(count: int, seed: int = 0) -> Tensor:
    """(count, 2, 4, 5) uint8, no pixel 0, so that padding shows."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 2, 4, 5), generator=rng, dtype=torch.uint8)


def every_crop(image: np.ndarray, padding: int, flip: bool) -> list[bytes]:
    """All that an image (C, H, W) may become, pixel by pixel."""
    _, height, width = image.shape
    crops = []
    for top in range(-padding, padding + 1):
        for left in range(-padding, padding + 1):
            crop = np.zeros_like(image)
            for row in range(max(0, -top), min(height, height - top)):
                for column in range(max(0, -left), min(width, width - left)):
                    crop[:, row, column] = image[:, row + top, column + left]
            crops.append(crop.tobytes())
            if flip:
                crops.append(np.ascontiguousarray(crop[:, :, ::-1]).tobytes())
    assert len(set(crops)) == (2 * padding + 1) ** 2 * (1 + flip)
    return crops


@pytest.mark.parametrize(("padding", "flip"), [(1, True), (2, True), (2, False), (0, True)])
def test_an_output_is_a_crop_of_its_own_image_and_every_crop_occurs(padding: int, flip: bool) -> None:
    images = random_images(600)
    outputs = Augmentation(padding, flip)(images, torch.Generator().manual_seed(3))
    assert outputs.shape == images.shape
    # index raises ValueError where the output is no crop of its image
    found = [
        every_crop(image, padding, flip).index(np.ascontiguousarray(output).tobytes())
        for image, output in zip(images.numpy(), outputs.numpy(), strict=True)
    ]
    # 50 kinds, 600 draws: one would be missing with a chance of 50 (49/50)^600 < 3e-4, and the seed is fixed.
    assert len(set(found)) == (2 * padding + 1) ** 2 * (1 + flip)


def test_no_padding_and_no_flip_change_nothing() -> None:
    images = random_images(10)
    assert torch.equal(Augmentation(0, flip=False)(images, torch.Generator()), images)


def test_equal_images_of_a_batch_get_different_crops() -> None:
    images = random_images(1).expand(64, -1, -1, -1)
    outputs = Augmentation(2, flip=True)(images, torch.Generator().manual_seed(3))
    assert len(outputs.unique(dim=0)) > 32


def test_the_generators_seed_decides_the_crops() -> None:
    def outputs(seed: int) -> Tensor:
        return Augmentation(2, flip=True)(random_images(64), torch.Generator().manual_seed(seed))

    assert torch.equal(outputs(3), outputs(3))
    assert not torch.equal(outputs(3), outputs(4))


def test_augmentation_keeps_its_input() -> None:
    images = random_images(16)
    before = images.clone()
    Augmentation(2, flip=True)(images, torch.Generator().manual_seed(3))
    assert torch.equal(images, before)


def test_crops_differ_between_workers_epochs_and_batches() -> None:
    pixels = random_images(1).permute(0, 2, 3, 1).expand(96, -1, -1, -1).numpy()
    images = ImageSet(pixels, np.zeros(96, np.uint8), pixels[:1], np.zeros(1, np.uint8))
    batches = [
        tuple(batch.flatten().tolist())
        for rank in range(2)
        for epoch in range(2)
        for batch, _ in make_task(
            images, 16, Place(rank, 2), augmentation=Augmentation(2, flip=True)
        ).train_batches(epoch)
    ]
    assert len(batches) == len(set(batches)) == 12


# --- normalisation --------------------------------------------------------------------------------


def test_normalised_training_images_have_mean_0_and_deviation_1_in_each_channel() -> None:
    rng = np.random.default_rng(0)
    scale = np.array([256, 128, 32])  # channels of different brightness and contrast
    pixels = (rng.random((500, 6, 5, 3)) * scale).astype(np.uint8)
    test = np.zeros((1, 6, 5, 3), np.uint8)
    images = ImageSet(pixels, np.zeros(500, np.uint8), test, np.zeros(1, np.uint8))
    ((batch, _),) = make_task(images, 500).train_batches(0)
    batch = batch.double()
    # z = (x - m) / s with m, x - m, s and the quotient rounded by u = 2^-24: z is off by (m / s) u + 3 |z| u.
    # For evenly spread pixels m / s < 1.8; the mean of |z| is at most 1, and the rounding of s moves no mean.
    # So the mean is off by less than 4 u, and the deviation, which a common shift does not change, by 3 u.
    tolerance = 4 * 2**-24
    assert batch.mean((0, 2, 3)).abs().max() <= tolerance
    assert (batch.std((0, 2, 3), correction=0) - 1).abs().max() <= tolerance


def test_test_images_are_normalised_by_the_training_images() -> None:
    witness = Witness()  # undoes the training images' mean and deviation
    make_task(numbered(10, 4), 1, model=witness).evaluate()
    assert witness.seen == [0, 1, 2, 3]


# --- loss and scores ------------------------------------------------------------------------------

LOG_3 = math.log(3)


class BrightOrDark(nn.Module):
    """Logits (0, log 3) for a pixel of +1, (0, -log 3) for -1: probabilities of 1/4 and 3/4."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(LOG_3))
        self.norm = nn.BatchNorm2d(1, eps=0)  # changes nothing when evaluating
        self.dropout = nn.Dropout(0.9)  # neither

    def forward(self, images: Tensor) -> Tensor:
        bright = self.dropout(self.norm(images)).view(-1) * self.slope
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


def bright_or_dark() -> ImageClassification:
    """Training pixels 0 and 2, which are -1 and 1 when normalised; of 5 test images 3 are called rightly."""
    train_x = np.array([0, 2, 0, 2], np.uint8).reshape(4, 1, 1, 1)
    test_x = np.array([2, 2, 0, 0, 0], np.uint8).reshape(5, 1, 1, 1)
    test_y = np.array([1, 0, 0, 0, 1], np.uint8)
    images = ImageSet(train_x, np.array([0, 1, 0, 1], np.uint8), test_x, test_y)
    return make_task(images, 4, model=BrightOrDark())


def test_loss_and_accuracy_are_those_worked_by_hand() -> None:
    sums = bright_or_dark().evaluate()
    assert set(sums) == {"loss", "accuracy"}
    assert sums["accuracy"] == (3.0, 5.0)
    loss, count = sums["loss"]
    # Right: -log(3/4), wrong: -log(1/4). The float32 sum of 5 terms below 1.4: error below 50 u, u = 2^-24.
    assert abs(loss - (3 * math.log(4 / 3) + 2 * math.log(4))) <= 50 * 2**-24
    assert count == 5.0


def test_the_training_loss_is_the_mean_cross_entropy_of_the_batch() -> None:
    task = bright_or_dark()
    task.model.eval()
    images = torch.tensor([1.0, 1.0, -1.0]).view(3, 1, 1, 1)
    loss = task.loss((images, torch.tensor([1, 0, 0])))
    # As above, of 3 terms.
    assert abs(loss.item() - (2 * math.log(4 / 3) + math.log(4)) / 3) <= 50 * 2**-24
    assert loss.requires_grad


# --- the memory format ----------------------------------------------------------------------------


def digits_of(memory_format: str, seed: int = 1) -> Digits:
    torch.manual_seed(seed)
    config = DigitsSettings(batch_per_worker=16, memory_format=memory_format)  # type: ignore[arg-type]
    return Digits(config, Path(), Place(0, 1), seeds=Seeds.derive(seed, 0), device=CPU)


def gradients_of(task: Digits) -> tuple[GradientBuffer, dict[str, Tensor]]:
    """The buffer after one backward pass, and its gradients, row by row."""
    gradient = GradientBuffer(task.model)
    gradient.zero()
    task.loss(next(task.train_batches(0))).backward()
    assert all(gradient.collect())
    return gradient, {
        name: p.grad.contiguous() for name, p in task.model.named_parameters() if p.grad is not None
    }


def test_channels_last_is_the_memory_of_images_and_weights_and_changes_no_result() -> None:
    plain, last = digits_of("contiguous"), digits_of("channels_last")
    weight = last.model.get_parameter("3.weight")  # (64, 32, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    (images, _), (other, _) = next(plain.train_batches(0)), next(last.train_batches(0))
    assert torch.equal(images, other)
    # One channel has no order; that of three has.
    colours = torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4)
    last._mean = last._std = torch.ones(1, 3, 1, 1)
    assert last._normalised(colours).is_contiguous(memory_format=torch.channels_last)
    assert last._normalised(colours).tolist() == (colours.float() - 1).tolist()

    (_, ours), (gradient, theirs) = (
        gradients_of(digits_of("contiguous")),
        gradients_of(digits_of("channels_last")),
    )
    assert [slot.shape for slot in gradient.layout if slot.name == "3.weight"] == [(64, 3, 3, 32)]
    for name, value in ours.items():
        # sums of at most 16 * 64 products in another order, and what BatchNorm makes of them
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-5 * value.abs().max().item())


@pytest.mark.parametrize(
    ("reducer", "settings", "rounding"),
    [("topk", {"density": 0.02}, 0.0), ("global_topk", {"density": 0.02}, 0.0), ("svd", {"rank": 2}, 1e-5)],
)
def test_what_a_reducer_sends_does_not_depend_on_the_memory_format(
    reducer: str, settings: dict[str, float], rounding: float
) -> None:
    """A low-rank method's matrix has its columns in another order; what is largest is largest in any."""
    means = []
    for memory_format in ("contiguous", "channels_last"):
        task = digits_of(memory_format)
        gradient, rng = GradientBuffer(task.model), torch.Generator().manual_seed(1)
        for parameter in task.model.parameters():
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=rng))
        built = build_reducer(reducer, gradient.layout, worker=0, **settings)
        send = gradient.flat.clone()
        built.reduce(send, gradient.flat, LocalComm.alone())
        means.append(
            {name: p.grad.contiguous() for name, p in task.model.named_parameters() if p.grad is not None}
        )
    plain, last = means
    assert all(value.count_nonzero() for value in plain.values()) or reducer == "global_topk"
    for name, value in plain.items():
        assert (value - last[name]).abs().max() <= rounding * value.abs().max()


def test_evaluating_changes_no_weight_and_no_buffer_and_leaves_the_model_training() -> None:
    task = bright_or_dark()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    graphs: list[bool] = []
    task.model.register_forward_hook(lambda *found: graphs.append(found[2].requires_grad))
    assert task.evaluate() == task.evaluate()
    assert graphs == [False, False]
    after = task.model.state_dict()
    assert {"slope", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} < set(after)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training for module in task.model.modules())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_accuracy_is_the_score_and_higher_is_better() -> None:
    task = bright_or_dark()
    assert (task.score, task.higher_is_better) == ("accuracy", True)


def test_a_batch_larger_than_the_data_is_an_error() -> None:
    make_task(numbered(50), 25, Place(0, 2))
    with pytest.raises(ValueError, match=r"^task\.batch_per_worker: expected at most 25 .* got 26$"):
        make_task(numbered(50), 26, Place(0, 2))


# --- models and data sets -------------------------------------------------------------------------


def test_resnet18_has_its_published_size_and_keeps_the_images_resolution_in_its_first_stage() -> None:
    model = resnet18(10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert len(list(model.parameters())) == 62
    sizes = []
    for context in (model.layer1, model.layer2, model.layer3, model.layer4):
        context.register_forward_hook(lambda *found: sizes.append(tuple(found[2].shape)))
    with torch.no_grad():
        outputs = model(torch.zeros(2, 3, 32, 32))
    assert outputs.shape == (2, 10)
    assert sizes == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)]


def rows_of(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Each image with its label, as bytes."""
    return [image.tobytes() + label.tobytes() for image, label in zip(images, labels, strict=True)]


def test_the_digits_are_split_in_1437_and_360_with_no_image_in_both_or_in_none() -> None:
    found = digits.read()
    assert found.train_x.shape == (1437, 8, 8, 1)
    assert found.test_x.shape == (360, 8, 8, 1)
    assert {array.dtype for array in vars(found).values()} == {np.dtype(np.uint8)}
    every = load_digits()
    expected = rows_of(every.images.astype(np.uint8), every.target.astype(np.uint8))
    rows = rows_of(found.train_x, found.train_y) + rows_of(found.test_x, found.test_y)
    assert sorted(rows) == sorted(expected)
    assert digits.NUM_TRAIN == 1437
    early = set(expected[:898]) & set(rows[1437:])
    assert 140 < len(early) < 220  # the test images come from the whole set, not from its end


def test_the_digits_are_split_the_same_way_at_every_call() -> None:
    first = digits.read()
    np.random.seed(5)  # a global state that must not matter
    second = digits.read()
    assert all(np.array_equal(array, vars(second)[key]) for key, array in vars(first).items())
    assert set(first.test_y) == set(range(10))
    assert first.test_y.tolist() != sorted(first.test_y)


def test_a_prepared_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_{kind}": rng.integers(0, 10, shape, dtype=np.uint8)
        for part, count in (("train", 7), ("test", 3))
        for kind, shape in (("x", (count, 32, 32, 3)), ("y", (count,)))
    }
    CIFAR10.path(tmp_path).parent.mkdir()
    np.savez(CIFAR10.path(tmp_path), classes=np.array(["airplane"]), **arrays)
    assert CIFAR10.check(tmp_path) == 7
    found = vars(CIFAR10.read(tmp_path))
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


@pytest.mark.realdata
def test_the_prepared_cifar10_passes_its_check_and_has_10_classes() -> None:
    data = Path(os.environ.get("SAGE_DATA", ""))
    if not os.environ.get("SAGE_DATA") or not CIFAR10.path(data).is_file():
        pytest.skip("needs SAGE_DATA, a folder with cifar10/cifar10.npz")
    found = CIFAR10.read(data)
    assert CIFAR10.check(data) == len(found.train_x) == len(found.train_y)
    assert len(found.test_x) == len(found.test_y)
    for images, labels in ((found.train_x, found.train_y), (found.test_x, found.test_y)):
        assert images.shape[1:] == (32, 32, 3)
        assert set(labels.tolist()) == set(range(10))
        assert len(np.unique(images[:100].reshape(100, -1), axis=0)) == 100  # real images, not a filling
