"""GoogLeNet with batch normalisation, in its CIFAR form."""

from functools import partial

from torch import nn
from torchvision.models.googlenet import Inception
from torchvision.ops import Conv2dNormActivation

STAGES = (
    ((192, 64, 96, 128, 16, 32, 32), (256, 128, 128, 192, 32, 96, 64)),
    (
        (480, 192, 96, 208, 16, 48, 64),
        (512, 160, 112, 224, 24, 64, 64),
        (512, 128, 128, 256, 24, 64, 64),
        (512, 112, 144, 288, 32, 64, 64),
        (528, 256, 160, 320, 32, 128, 128),
    ),
    ((832, 256, 160, 320, 32, 128, 128), (832, 384, 192, 384, 48, 128, 128)),
)
"""Szegedy et al. 2014, arXiv 1409.4842, table 1, inceptions 3a to 5b: the channels that come in, and of the
1 x 1, the 3 x 3's reduction, the 3 x 3, the 5 x 5's reduction, the 5 x 5, the pool's projection."""

# A convolution with bias, batch normalisation and ReLU; "same" padding.
_conv = partial(Conv2dNormActivation, bias=True)


def googlenet(num_classes: int) -> nn.Module:
    """GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842) for images (B, 3, 32, 32).

    Departures from the paper, those of the published CIFAR form: one 3 x 3 convolution of 192 channels as
    stem, which keeps the resolution; batch normalisation after every convolution; two 3 x 3 convolutions for
    each 5 x 5 (arXiv 1512.00567, section 3.1); no auxiliary classifier and no dropout. A convolution of k x k
    from i to o channels has k k i o + o parameters, its normalisation 2 o:

        stem        9 3 192 + 3 192 = 5,760
        3a, 3b      165,552 + 424,096                               = 589,648
        4a to 4e    386,016 + 462,936 + 523,912 + 611,072 + 952,704 = 2,936,640
        5a, 5b      1,127,808 + 1,496,144                           = 2,623,952
        classifier  1,024 classes + classes = 10,250 (10), 102,500 (100)

    in all 6,166,250 with 10 classes, 6,258,500 with 100. 3a, for example: 12,480 (1 x 1), 18,720 + 110,976
    (reduction and 3 x 3), 3,120 + 4,704 + 9,312 (reduction and twice 3 x 3), 6,240 (the pool's projection).
    """
    stages = [nn.Sequential(*(_inception(*channels) for channels in stage)) for stage in STAGES]
    return nn.Sequential(
        _conv(3, STAGES[0][0][0], kernel_size=3),  # (B, 192, 32, 32)
        stages[0],  # (B, 480, 32, 32)
        nn.MaxPool2d(3, stride=2, padding=1),
        stages[1],  # (B, 832, 16, 16)
        nn.MaxPool2d(3, stride=2, padding=1),
        stages[2],  # (B, 1024, 8, 8)
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1024, num_classes),
    )


def _inception(*channels: int) -> Inception:
    """torchvision's inception, whose branch3 has a 3 x 3 where the paper has a 5 x 5, with another 3 x 3."""
    inception = Inception(*channels, conv_block=_conv)
    inception.branch3.append(_conv(channels[5], channels[5], kernel_size=3))
    return inception
