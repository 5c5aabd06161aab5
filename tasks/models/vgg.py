"""VGG-16 with batch normalisation, in its CIFAR form."""

from torch import nn
from torchvision.models.vgg import cfgs, make_layers


def vgg16_bn(num_classes: int) -> nn.Module:
    """VGG-16 (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1, column D) for images (B, 3, 32, 32).

    The five poolings leave 512 features at one place, so a head 512-512-512 with dropout before each of its
    first two layers takes the place of the paper's 25,088-4,096-4,096. Parameters:

        3 x 3 convolutions   9 (3 64 + 64 64 + 64 128 + 128 128 + 128 256 + 2 256 256 + 256 512 + 5 512 512)
                             + 4,224 biases                                             = 14,714,688
        normalisations       2 x 4,224 channels                                         =      8,448
        head                 2 (512 512 + 512) + 512 classes + classes                  =    530,442 (10)

    in all 15,253,578 with 10 classes, 15,299,748 with 100.
    """
    features = make_layers(cfgs["D"], batch_norm=True)  # (B, 3, 32, 32) -> (B, 512, 1, 1)
    for module in features:
        if isinstance(module, nn.Conv2d):  # He et al. 2015, arXiv 1502.01852, as torchvision's VGG does
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    head = nn.Sequential(
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, num_classes),
    )
    return nn.Sequential(features, nn.Flatten(), head)
