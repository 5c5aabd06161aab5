"""A small CNN on scikit-learn's digits: real images without a download."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from sage.config import Named
from sage.interfaces import Place, Seeds
from tasks.classification import ClassificationSettings, ImageClassification, check_batch
from tasks.data import digits
from tasks.models.small_cnn import small_cnn


class DigitsSettings(ClassificationSettings):
    name: Literal["digits"] = "digits"
    model: Literal["small_cnn"] = "small_cnn"
    """The network."""
    batch_per_worker: int = Field(default=32, ge=1)
    """Images a worker takes in a step."""


class Digits(ImageClassification):
    """10 classes, 8 x 8 images, 1,437 for training and 360 for testing; no augmentation."""

    Settings: ClassVar[type[Named]] = DigitsSettings

    def __init__(
        self, config: DigitsSettings, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(
            small_cnn(10),
            digits.read(),
            config.batch_per_worker,
            place,
            seeds=seeds,
            device=device,
            memory_format=config.memory_format,
        )

    @classmethod
    def check(cls, config: DigitsSettings, data: Path, world_size: int) -> None:
        check_batch(config.batch_per_worker, digits.NUM_TRAIN, world_size)
