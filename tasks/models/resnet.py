"""ResNet-18 in its CIFAR form."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def resnet18(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2015, arXiv 1512.03385) with a stem for 32 x 32 images.

    A 3 x 3 convolution of stride 1 without pooling; 11,173,962 parameters with 10 classes. Takes (B, 3, 32,
    32).
    """
    model: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as the others there
    model.maxpool = nn.Identity()
    return model
