"""Image classification: data resident on the device, batched augmentation, accuracy over the whole test
set."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from sage.config import Named
from sage.interfaces import Place, Seeds, Task, seed_of

EVALUATION_BATCH = 500
"""Images at a time on a worker when evaluating; bounds the memory, does not change the result's meaning."""


MemoryFormat = Literal["contiguous", "channels_last"]
MEMORY_FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class ClassificationSettings(Named):
    memory_format: MemoryFormat = "contiguous"
    """channels_last: images and the weights of convolutions have their channels innermost, which is faster on
    a GPU with TF32 or bfloat16. The model is the same; reducers meet a weight's elements in the order of its
    memory, so that those that draw elements draw others."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, H, W, C) uint8 and labels (N,) uint8, for training and for testing."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Each image gets its own random crop after zero padding, and is flipped left to right or not."""

    padding: int
    flip: bool

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """images (B, C, H, W) -> (B, C, H, W), of any dtype."""
        batch, _, height, width = images.shape
        device, size = images.device, 2 * self.padding + 1
        padded = F.pad(images, [self.padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, size, size, H, W), a view
        top = torch.randint(size, (batch,), generator=rng, device=device)
        left = torch.randint(size, (batch,), generator=rng, device=device)
        images = windows[torch.arange(batch, device=device), :, top, left]
        if self.flip:
            flipped = torch.randint(2, (batch,), generator=rng, device=device)
            both = torch.cat([images, images.flip(3)])  # (2 B, C, H, W); whole images are quick to choose
            images = both.index_select(0, torch.arange(batch, device=device) + batch * flipped)
        return images


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each channel's mean and standard deviation (C,) float64 of images (N, H, W, C) uint8, by histogram."""
    channels = range(images.shape[-1])
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in channels])  # (C, 256)
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256)
    mean = shares @ values
    return mean, np.sqrt(shares @ values**2 - mean**2)


def check_batch(batch_per_worker: int, num_images: int, world_size: int) -> None:
    """Raise ValueError where a global batch is larger than the training set."""
    if batch_per_worker * world_size > num_images:
        raise ValueError(
            f"task.batch_per_worker: expected at most {num_images // world_size} (a worker's share of "
            f"{num_images} images over {world_size} workers), got {batch_per_worker}"
        )


class ImageClassification(Task):
    """Cross entropy on an ImageSet.

    An epoch visits the images in an order common to all workers, of which each takes its slice of every
    global batch. The images left over at the end, fewer than a global batch, are not used; they are others
    each epoch.
    """

    score = "accuracy"
    score_limits = (0.0, 1.0)
    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        batch_per_worker: int,
        place: Place,
        *,
        seeds: Seeds,
        device: torch.device,
        augmentation: Augmentation | None = None,
        memory_format: MemoryFormat = "contiguous",
    ) -> None:
        check_batch(batch_per_worker, len(images.train_x), place.world_size)
        self.memory_format = MEMORY_FORMATS[memory_format]
        self.model = model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.batch_per_worker = batch_per_worker
        self.place = place
        self.seeds = seeds
        self.device = device
        self.augmentation = augmentation
        self._train_x = _channels_first(images.train_x, device)  # (N, C, H, W) uint8
        self._train_y = _labels(images.train_y, device)
        shard = slice(place.rank, None, place.world_size)  # every test image on exactly one worker
        self._test_x = _channels_first(images.test_x[shard], device)
        self._test_y = _labels(images.test_y[shard], device)
        self.steps_per_epoch = len(self._train_x) // (batch_per_worker * place.world_size)
        # Per channel (1, C, 1, 1), over the training images.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in channel_statistics(images.train_x)
        )

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32, normalised, and labels (B,) int64.

        The randomness of a batch depends on seed, worker, epoch and batch alone, so an epoch can start
        anywhere.
        """
        rng = torch.Generator().manual_seed(seed_of(self.seeds.common, "order", epoch))
        order = torch.randperm(len(self._train_x), generator=rng).to(self.device)
        rng = torch.Generator(self.device)
        for batch in range(start, self.steps_per_epoch):
            first = (batch * self.place.world_size + self.place.rank) * self.batch_per_worker
            chosen = order[first : first + self.batch_per_worker]
            images = self._train_x.index_select(0, chosen)  # a third of the time of [chosen]
            if self.augmentation is not None:
                rng.manual_seed(seed_of(self.seeds.worker, "augmentation", epoch, batch))
                images = self.augmentation(images, rng)
            yield self._normalised(images), self._train_y[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[float, float]]:
        """loss and accuracy over this worker's test images."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in zip(
            self._test_x.split(EVALUATION_BATCH), self._test_y.split(EVALUATION_BATCH), strict=True
        ):
            outputs = self.model(self._normalised(images)).float()
            loss += F.cross_entropy(outputs, labels, reduction="sum")
            correct += (outputs.argmax(1) == labels).sum()
        self.model.train()
        count = float(len(self._test_x))
        return {"loss": (loss.item(), count), "accuracy": (float(correct.item()), count)}

    def _normalised(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32, each channel with the training set's mean 0 and deviation 1, in the
        task's memory format."""
        values = images.to(torch.float32, memory_format=self.memory_format)
        return values.sub_(self._mean).div_(self._std)  # one new tensor: fresh pages cost most


def _channels_first(images: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)


def _labels(labels: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64)).to(device)
