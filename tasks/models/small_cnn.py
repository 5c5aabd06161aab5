"""A small CNN for 8 x 8 images: seconds to train on one core."""

from torch import nn


def small_cnn(num_classes: int) -> nn.Module:
    """Two convolutions with batch normalisation and two linear layers; takes (B, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )
