"""CNNs on CIFAR-10."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from sage.config import Named
from sage.interfaces import Place, Seeds
from tasks.classification import Augmentation, ImageClassification, check_batch
from tasks.data import cifar10
from tasks.models.resnet import resnet18

MODELS = {"resnet18": resnet18}


class Cifar10Settings(Named):
    name: Literal["cifar10"] = "cifar10"
    model: Literal["resnet18"] = "resnet18"
    batch_per_worker: int = Field(default=256, ge=1)
    """Images a worker takes in a step."""


class Cifar10(ImageClassification):
    """10 classes, 32 x 32 images; random crops after padding by 4, and flips."""

    Settings: ClassVar[type[Named]] = Cifar10Settings

    def __init__(
        self, config: Cifar10Settings, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(
            MODELS[config.model](10),
            cifar10.read(data),
            config.batch_per_worker,
            place,
            seeds=seeds,
            device=device,
            augmentation=Augmentation(padding=4, flip=True),
        )

    @classmethod
    def check(cls, config: Cifar10Settings, data: Path, world_size: int) -> None:
        check_batch(config.batch_per_worker, cifar10.check(data), world_size)
