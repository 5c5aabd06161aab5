"""SENet-18: a pre-activation ResNet-18 with squeeze and excitation, in its CIFAR form."""

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels, and the stride of the first block; two blocks each."""
REDUCTION = 16
"""r in Hu et al. 2017, section 6.4: the channels for each one that the squeeze keeps."""


class SEPreActBlock(nn.Module):
    """(B, channels_in, H, W) -> (B, channels, H / stride, W / stride).

    He et al. 2016, arXiv 1603.05027, figure 4(e): normalisation and ReLU stand before each convolution; where
    the shape changes, a 1 x 1 convolution of what the first of them gives is the shortcut. Squeeze and
    excitation weighs the residual's channels: Hu et al. 2017, arXiv 1709.01507, figure 3.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.excitation = SqueezeExcitation(channels, channels // REDUCTION)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.excitation(self.conv2(self.norm2(self.conv1(active)).relu()))
        return residual + shortcut


def senet18(num_classes: int) -> nn.Module:
    """SENet-18 for images (B, 3, 32, 32): a 3 x 3 stem with normalisation, 2 blocks at each of 4 resolutions.

    A block from i to o channels has 2 i + 9 i o + 2 o + 9 o o parameters, with q = o / 16 another
    2 o q + q + o for the squeeze and excitation, and i o more where the shape changes:

        stem          9 3 64 + 2 64 = 1,856
        64 channels   74,564 + 74,564
        128           231,944 + 297,608
        256           926,736 + 1,189,136
        512           3,704,864 + 4,753,952
        classifier    512 classes + classes = 5,130 (10), 51,300 (100)

    in all 11,260,354 with 10 classes, 11,306,524 with 100. As in the published form, no normalisation
    follows the last block. (The published network for 100 classes has 11,436,256: a slip in its last stage.)
    """
    blocks: list[nn.Module] = []
    channels_in = 64
    for channels, stride in STAGES:
        blocks += [SEPreActBlock(channels_in, channels, stride), SEPreActBlock(channels, channels, 1)]
        channels_in = channels
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        *blocks,  # (B, 512, 4, 4)
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )
