"""CNNs on CIFAR-10 and CIFAR-100."""

from importlib import import_module
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sage.config import Named
from sage.interfaces import Place, Seeds
from tasks.classification import Augmentation, ClassificationSettings, ImageClassification, check_batch
from tasks.data.cifar import CIFAR10, CIFAR100, CifarSet

MODELS = {
    "resnet18": "tasks.models.resnet",
    "vgg16_bn": "tasks.models.vgg",
    "googlenet": "tasks.models.googlenet",
    "senet18": "tasks.models.senet",
}
"""Each network, and the module that has a function of its name."""


def build_model(name: str, num_classes: int) -> nn.Module:
    """A network of MODELS. Its module is imported here: it imports torchvision, which takes a second."""
    model: nn.Module = getattr(import_module(MODELS[name]), name)(num_classes)
    return model


class CifarSettings(ClassificationSettings):
    model: Literal["resnet18", "vgg16_bn", "googlenet", "senet18"] = "resnet18"
    """The network, in its form for images of 32 by 32 pixels."""
    batch_per_worker: int = Field(default=256, ge=1)
    """Images a worker takes in a step."""


class Cifar(ImageClassification):
    """32 x 32 images; random crops after padding by 4, and flips."""

    source: ClassVar[CifarSet]

    def __init__(
        self, config: CifarSettings, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(
            build_model(config.model, self.source.num_classes),
            self.source.read(data),
            config.batch_per_worker,
            place,
            seeds=seeds,
            device=device,
            augmentation=Augmentation(padding=4, flip=True),
            memory_format=config.memory_format,
        )

    @classmethod
    def check(cls, config: CifarSettings, data: Path, world_size: int) -> None:
        check_batch(config.batch_per_worker, cls.source.check(data), world_size)


class Cifar10Settings(CifarSettings):
    name: Literal["cifar10"] = "cifar10"


class Cifar10(Cifar):
    """10 classes."""

    Settings: ClassVar[type[Named]] = Cifar10Settings
    source = CIFAR10


class Cifar100Settings(CifarSettings):
    name: Literal["cifar100"] = "cifar100"


class Cifar100(Cifar):
    """100 classes, the fine labels."""

    Settings: ClassVar[type[Named]] = Cifar100Settings
    source = CIFAR100
